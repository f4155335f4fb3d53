"""The mean-field tail: dropped pages are attended to as one key and value each, their means.

FlashAttention over gathered vectors; a page's mean stands for page_size tokens, whose logarithm is
added to its score. Bytes: two vectors of each dropped page for each tile of rows, 1 / page_size of
what attention to the pages themselves would read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sps_runtime.ops.triton.pools import PoolTable, page_pointer


@triton.jit
def tail_kernel(
    q, blocks, dropped, dropped_ids, blobs, offsets, out, lse, q_token, q_head, o_token, o_head,
    l_token, l_head, slots_per_rank, slot_stride, head_stride, kv_heads, scale, log_count,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """Program (r, i): a tile of rows of item i; with ONTO what is there is merged with."""
    item = tl.program_id(1)
    block, head = blocks + item // kv_heads * 6, item % kv_heads
    first, rows = tl.load(block), tl.load(block + 1)
    begin, count = tl.load(dropped + item * 2), tl.load(dropped + item * 2 + 1)
    folded = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, some, column = folded // GROUP, folded < rows * GROUP, tl.arange(0, BLOCK_D)
    if count > 0 and tl.program_id(0) * BLOCK_M < rows * GROUP:
        row = (first + token).to(tl.int64)
        query_head = head * GROUP + folded % GROUP
        there = some[:, None] & (column < D)[None, :]
        at = (row * q_token + query_head * q_head)[:, None] + column[None, :]
        queries = tl.load(q + at, mask=there, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if ONTO:
            # What is there counts as one key of score lse.
            lse_at = lse + row * l_token + query_head * l_head
            largest = tl.load(lse_at, mask=some, other=float("-inf"))
            o_at = out + (row * o_token + query_head * o_head)[:, None] + column[None, :]
            seen = largest > float("-inf")
            acc = tl.load(o_at, mask=there & seen[:, None], other=0.0)
            total = tl.where(seen, 1.0, 0.0)
        for start in range(0, count, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ids = tl.load(dropped_ids + begin + n, mask=n < count, other=0)
            page = page_pointer(
                blobs + head * head_stride, offsets, ids, slots_per_rank, slot_stride
            )
            vectors = page.to(tl.pointer_type(q.dtype.element_ty))[:, None] + column[None, :]
            given = (n < count)[:, None] & (column < D)[None, :]
            k = tl.load(vectors, mask=given, other=0.0)
            score = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale + log_count
            score = tl.where((n < count)[None, :], score, float("-inf"))
            above = tl.maximum(largest, tl.max(score, axis=1))
            kept, weight = tl.exp(largest - above), tl.exp(score - above[:, None])
            v = tl.load(vectors + D, mask=given, other=0.0)
            acc = tl.dot(weight.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            total = total * kept + tl.sum(weight, axis=1)
            largest = above
        o_to = out + (row * o_token + query_head * o_head)[:, None] + column[None, :]
        tl.store(o_to, acc / total[:, None], mask=there)
        tl.store(lse + row * l_token + query_head * l_head, largest + tl.log(total), mask=some)


def tail_attention(
    q_THD: Tensor,
    blocks: Tensor,
    dropped: Tensor,
    dropped_ids: Tensor,
    summaries: PoolTable,
    slots_per_rank: int,
    out_THD: Tensor,
    lse_TH: Tensor,
    *,
    rows: int,
    page_size: int,
    scale: float,
    onto: bool,
) -> None:
    """The tail's partial of each (block, KV head) that dropped something, into `out` and `lse`
    (fp32), merged with what is there if `onto`; others are left as they are.

    Args:
        blocks, dropped, dropped_ids: as in `sparse.operators`, on the device.
        rows: of the largest block.
    """
    _, heads, dim = q_THD.shape
    kv_heads = summaries.base.shape[1]
    items, group = len(blocks) * kv_heads, heads // kv_heads
    if items == 0 or rows == 0:
        return
    wide = q_THD.element_size() * triton.next_power_of_2(dim) > 256
    most = 32 if q_THD.dtype == torch.float32 else 64
    block_m = min(max(16, triton.next_power_of_2(rows * group)), most)
    tail_kernel[(triton.cdiv(rows * group, block_m), items)](
        q_THD, blocks, dropped, dropped_ids, summaries.base, summaries.offsets, out_THD, lse_TH,
        q_THD.stride(0), q_THD.stride(1), out_THD.stride(0), out_THD.stride(1),
        lse_TH.stride(0), lse_TH.stride(1), slots_per_rank,
        summaries.base.stride(0), summaries.base.stride(1), kv_heads, scale, math.log(page_size),
        GROUP=group, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=block_m,
        BLOCK_N=16 if wide else 32, ONTO=onto,
    )  # fmt: skip

"""Paged attention over tensors: from what is known of a call to the kernel's tiles and splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sps_runtime.ops.kv_rows import row_format
from sps_runtime.ops.triton.kv_write import FORMATS
from sps_runtime.ops.triton.paged_attention import attention_kernel
from sps_runtime.ops.triton.pools import PoolTable
from sps_runtime.ops.triton.states import merge_splits

SPLIT_TOKENS = 512
"""The least that a split of a list is worth a program."""
MOST_SPLITS = 32


@dataclass(frozen=True)
class Sizes:
    """What the host knows of a call's items, exactly or as a guess; results do not depend on it,
    but for the order of sums.

    Attributes:
        rows: queries of the largest item.
        kv_heads: KV heads of an item.
        pages: of the longest list.
        processors: of the device; with fewer programs than these, lists are split.
    """

    rows: int
    kv_heads: int
    pages: int
    processors: int


@dataclass(frozen=True)
class Tiles:
    """Folded rows and keys of a tile, warps, depth of the pipeline of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(
    rows: int, head_dim: int, page_size: int, dtype: torch.dtype, kv_format: str
) -> Tiles:
    """Tiles whose keys, values and queries fit the 163 KiB of shared memory of sm_80.

    Loads of quantised rows are not pipelined: triton 3.7 cannot copy bytes asynchronously into the
    layout that they are multiplied in. More programs on a processor hide their latency.

    Args:
        rows: folded rows (queries times heads of a KV head) of an item.
    """
    wide = dtype.itemsize * triton.next_power_of_2(head_dim) > 256
    most = 32 if dtype == torch.float32 else 64 if wide else 128
    block_m = min(max(16, triton.next_power_of_2(rows)), most)
    block_n = min(page_size & -page_size, 32 if wide else 64)
    stages = 1 if kv_format != "native" else 2 if wide else 3
    return Tiles(block_m, block_n, 8 if block_m == 128 else 4, stages)


def paged_attention(
    q_THD: Tensor,
    k: PoolTable,
    v: PoolTable,
    slots_per_rank: int,
    items: Tensor,
    page_ids: Tensor,
    page_positions: Tensor,
    o_THD: Tensor,
    lse_TH: Tensor,
    *,
    sizes: Sizes,
    scale: float,
    window: int | None = None,
) -> None:
    """The partials of items, as `attention.backend.PageLists` has them, into `o` and `lse`.

    Args:
        q_THD: the last dim contiguous.
        k, v: pools of one layer, heads sliced or not; rows as `ops.kv_rows` has them.
        items, page_ids, page_positions: int32 on q's device.
        o_THD, lse_TH: fp32, contiguous; what is in no item is left as it is.
    """
    _, heads, dim = q_THD.shape
    if len(items) == 0 or q_THD.numel() == 0:
        return
    _, kv_heads, page, row = k.base.shape
    group = heads // kv_heads
    kv_format = row_format(k.base, dim)
    tiles = choose_tiles(sizes.rows * group, dim, page, q_THD.dtype, kv_format)
    work = triton.cdiv(sizes.rows * group, tiles.rows) * sizes.kv_heads
    splits = choose_splits(work * len(items), sizes.pages * page, sizes.processors)
    o, lse = o_THD, lse_TH
    if splits > 1:  # rows in no item keep what they have
        o = o_THD.expand(splits, *o_THD.shape).contiguous()
        lse = lse_TH.expand(splits, *lse_TH.shape).contiguous()
        o[1:], lse[1:] = 0.0, -torch.inf
    attention_kernel[(work, len(items), splits)](
        q_THD, k.base, v.base, k.offsets, v.offsets, items, page_ids, page_positions, o, lse,
        q_THD.stride(0), q_THD.stride(1), slots_per_rank, k.base.stride(0), k.base.stride(1),
        o_THD.numel(), lse_TH.numel(), heads, scale, window or 0,
        GROUP=group, D=dim, ROW=row, BLOCK_D=max(16, triton.next_power_of_2(dim)), PAGE=page,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, FORMAT=FORMATS[kv_format],
        WINDOW=bool(window), KV_SPLITS=splits,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        merge_splits(o, lse, o_THD, lse_TH)


def choose_splits(programs: int, tokens: int, processors: int) -> int:
    """Splits of each list: enough programs for the device twice over, none for too few keys."""
    if programs >= processors:
        return 1
    most = min(MOST_SPLITS, -(-tokens // SPLIT_TOKENS))
    return max(1, min(-(-2 * processors // programs), most))

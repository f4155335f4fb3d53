"""Rotary position embedding of q and k, and of k on its way into its page (Su et al. 2021).

Dims i and i + r / 2 form a pair, as in Hugging Face's checkpoints. Cosines and sines come from a
table that a step makes once for all layers. Bytes: q and k in and out, and with the write v in and
K and V out, where a rotation and a write apart would read k again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sps_runtime.ops.kv_rows import row_format
from sps_runtime.ops.triton.kv_write import FORMATS, tokens_each, write_rows


@triton.jit
def rope_kernel(
    q, k, v, table, k_pool, v_pool, slots, offsets, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, slot_stride, head_stride,
    Q_HEADS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, FORMAT: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Program (t, h) turns head h of a few tokens: q's heads come first, then k's."""
    token, head = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    there = (token < tokens)[:, None] & (column < DIM)[None, :]
    # Each lane computes its own element from the pair; dims beyond 2 HALF stay.
    turned = there & (column < 2 * HALF)[None, :]
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    angle = token[:, None] * (2 * HALF) + tl.where(column < HALF, column, column - HALF)[None, :]
    cos = tl.load(table + angle, mask=turned, other=1.0)
    sin = tl.load(table + angle + HALF, mask=turned, other=0.0)
    sign = tl.where(column < HALF, -1.0, 1.0)[None, :]
    if head < Q_HEADS:
        base = q + head * q_head + (token * q_token)[:, None]
    else:
        base = k + (head - Q_HEADS) * k_head + (token * k_token)[:, None]
    x = tl.load(base + column[None, :], mask=there, other=0.0)
    y = tl.load(base + partner[None, :], mask=turned, other=0.0)
    out = (x.to(tl.float32) * cos + sign * y.to(tl.float32) * sin).to(x.dtype)
    tl.debug_barrier()  # all lanes have read their pairs
    tl.store(base + column[None, :], out, mask=turned)
    if WRITE and head >= Q_HEADS:
        kv_head = head - Q_HEADS
        slot = tl.load(slots + token, mask=token < tokens, other=-1).to(tl.int64)
        offset = tl.load(offsets + token, mask=token < tokens, other=0)
        at = slot * slot_stride + kv_head * head_stride + offset * ROW
        write_rows(k_pool, at, out, slot >= 0, DIM, BLOCK, FORMAT)
        v_at = (token * v_token)[:, None] + kv_head * v_head + column[None, :]
        value = tl.load(v + v_at, mask=there, other=0.0)
        write_rows(v_pool, at, value, slot >= 0, DIM, BLOCK, FORMAT)


def rope_table(positions_T: Tensor, frequencies_F: Tensor, scale: float) -> Tensor:
    """Cosines of each position's fp32 angles, then their sines: fp32 ``[tokens, 2 F]``."""
    angles_TF = positions_T.float()[:, None] * frequencies_F
    return torch.cat((angles_TF.cos(), angles_TF.sin()), dim=1).mul_(scale)


def rope_(q_THD: Tensor, k_TKD: Tensor, table_TR: Tensor) -> None:
    """Rotate q and k in place, in fp32, rounded once.

    Args:
        q_THD, k_TKD: ``[tokens, heads, head_dim]`` each, the last dim contiguous.
        table_TR: of `rope_table`.
    """
    _launch(q_THD, k_TKD, None, table_TR, None, None, None, None)


def rope_kv_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    table_TR: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots_T: Tensor,
    offsets_T: Tensor,
) -> None:
    """`rope_`, then put each token's rotated k and its v into its page, in one pass.

    Args:
        k_pool, v_pool: ``[slots, kv_heads, page_size, row]`` of one layer, rows as `ops.kv_rows`
            has them.
        slots_T, offsets_T: int32; slot < 0 for a token that is written nowhere.
    """
    _launch(q_THD, k_TKD, v_TKD, table_TR, k_pool, v_pool, slots_T, offsets_T)


def _launch(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor | None,
    table_TR: Tensor,
    k_pool: Tensor | None,
    v_pool: Tensor | None,
    slots_T: Tensor | None,
    offsets_T: Tensor | None,
) -> None:
    tokens, heads, dim = q_THD.shape
    kv_heads, row = k_TKD.shape[1], dim
    if tokens == 0 or heads + kv_heads == 0:
        return
    kv_format, strides = "native", (0, 0)
    if k_pool is not None:
        kv_format, row = row_format(k_pool, dim), k_pool.shape[-1]
        strides = k_pool.stride(0), k_pool.stride(1)
    v = k_TKD if v_TKD is None else v_TKD
    each = tokens_each(tokens)
    rope_kernel[(triton.cdiv(tokens, each), heads + kv_heads)](
        q_THD, k_TKD, v, table_TR, k_pool, v_pool, slots_T, offsets_T, tokens,
        q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1),
        v.stride(0), v.stride(1), *strides,
        Q_HEADS=heads, HALF=table_TR.shape[1] // 2, DIM=dim, ROW=row,
        BLOCK=triton.next_power_of_2(dim), TOKENS=each, FORMAT=FORMATS[kv_format],
        WRITE=k_pool is not None,
    )  # fmt: skip

"""Tokens' keys and values into their pages: native, fp8 e4m3 or int8 rows. Bytes: in and out."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sps_runtime.ops.kv_rows import row_format
from sps_runtime.ops.triton.fp8 import to_e4m3

NATIVE, FP8, INT8 = 0, 1, 2
FORMATS = {"native": NATIVE, "fp8_e4m3": FP8, "int8": INT8}


@triton.jit
def write_rows(
    pool, at, x, there, DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Keys or values ``x [rows, BLOCK]`` at elements ``at [rows]`` of a pool, as
    `ops.kv_rows.encode` has them; rows that are not `there` are written nowhere."""
    column = tl.arange(0, BLOCK)
    mask, to = there[:, None] & (column < DIM)[None, :], pool + at[:, None] + column[None, :]
    if FORMAT == 0:
        tl.store(to, x, mask=mask)
    elif FORMAT == 1:
        tl.store(to, to_e4m3(x.to(tl.float32)), mask=mask)
    else:
        wide = x.to(tl.float32)
        largest = tl.max(tl.where(mask, tl.abs(wide), 0.0), axis=1)
        some = largest > 1e-30  # a step's inverse would overflow
        scale = tl.where(some, tl.div_rn(largest, 127.0), 0.0)
        inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, largest, 1.0)), 0.0)
        steps = (wide * inverse[:, None] + 12582912.0) - 12582912.0  # to the nearest, ties to even
        tl.store(to, steps.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
        tl.store((pool + at + DIM).to(tl.pointer_type(tl.float32)), scale, mask=there)


@triton.jit
def write_kernel(
    k, v, k_pool, v_pool, slots, offsets, tokens,
    k_token, k_head, v_token, v_head, slot_stride, head_stride,
    DIM: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (t, h): both rows of KV head h of a few tokens."""
    token, head = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + token, mask=token < tokens, other=-1).to(tl.int64)
    at = slot * slot_stride + head * head_stride
    at += tl.load(offsets + token, mask=token < tokens, other=0) * ROW
    there = (slot >= 0)[:, None] & (column < DIM)[None, :]
    k_at = (token * k_token)[:, None] + head * k_head + column[None, :]
    write_rows(k_pool, at, tl.load(k + k_at, mask=there, other=0.0), slot >= 0, DIM, BLOCK, FORMAT)
    v_at = (token * v_token)[:, None] + head * v_head + column[None, :]
    write_rows(v_pool, at, tl.load(v + v_at, mask=there, other=0.0), slot >= 0, DIM, BLOCK, FORMAT)


def tokens_each(tokens: int) -> int:
    """Tokens of one program: few where there are few, so that a decode step fills the device."""
    return 16 if tokens >= 64 else 2


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots_T: Tensor,
    offsets_T: Tensor,
) -> None:
    """Put token t's K and V at (slots_T[t], offsets_T[t]), int32 both, all pairs distinct.

    Args:
        k_TKD, v_TKD: ``[tokens, kv_heads, head_dim]``, the last dim contiguous.
        k_pool, v_pool: ``[slots, kv_heads, page_size, row]`` of equal strides, pages contiguous,
            rows as `ops.kv_rows` has them.
        slots_T: < 0 for a token that is written nowhere.
    """
    tokens, heads, dim = k_TKD.shape
    if tokens == 0 or heads == 0:
        return
    each = tokens_each(tokens)
    write_kernel[(triton.cdiv(tokens, each), heads)](
        k_TKD, v_TKD, k_pool, v_pool, slots_T, offsets_T, tokens,
        k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0), v_TKD.stride(1),
        k_pool.stride(0), k_pool.stride(1),
        DIM=dim, ROW=k_pool.shape[-1], BLOCK=triton.next_power_of_2(dim), TOKENS=each,
        FORMAT=FORMATS[row_format(k_pool, dim)],
    )  # fmt: skip

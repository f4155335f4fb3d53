"""Partials of attention: merged, and packed for the wire.

A partial is (o, lse): `ops.merge_state` says what merging means. lse is fp32 and a natural log
everywhere, -inf where no key was seen. Bytes: each partial in once, the merged one out once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""(token, head) pairs of one program."""


@triton.jit
def fold(state, o, lse):
    """A partial's rows onto ``(acc, largest, total)``; none of them is -inf less -inf, a NaN."""
    acc, largest, total = state
    above = tl.maximum(largest, lse)
    base = tl.where(above == float("-inf"), 0.0, above)
    kept, weight = tl.exp(largest - base), tl.exp(lse - base)
    acc = acc * kept[:, None] + o.to(tl.float32) * weight[:, None]
    return acc, above, total * kept + weight


@triton.jit
def nothing(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that saw no key."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    return tl.zeros([ROWS, BLOCK], tl.float32), largest, tl.zeros([ROWS], tl.float32)


@triton.jit
def merge_kernel(
    os, lses, o_tokens, o_heads, lse_tokens, lse_heads, out, lse_out, out_token, out_head, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """`os`, `lses` and their strides are tuples, one entry for each partial."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    token, head = row // HEADS, row % HEADS
    some = row < rows
    there = some[:, None] & (column < DIM)[None, :]
    state = nothing(ROWS, BLOCK)
    for i in tl.static_range(COUNT):
        at = token * lse_tokens[i] + head * lse_heads[i]
        lse = tl.load(lses[i] + at, mask=some, other=float("-inf"))
        o_at = (token * o_tokens[i] + head * o_heads[i])[:, None] + column[None, :]
        o = tl.load(os[i] + o_at, mask=there & (lse > float("-inf"))[:, None], other=0.0)
        state = fold(state, o, lse)
    acc, largest, total = state
    merged = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = (token * out_token + head * out_head)[:, None] + column[None, :]
    tl.store(out + out_at, merged.to(out.dtype.element_ty), mask=there)
    tl.store(lse_out + row, largest + tl.log(total), mask=some)


def merge_states(
    partials: Sequence[tuple[Tensor, Tensor]], out_THD: Tensor, lse_TH: Tensor | None = None
) -> Tensor:
    """Merge partials of the same queries over disjoint keys, in their order, in one pass.

    Args:
        partials: at least one (o ``[tokens, heads, head_dim]`` of any float dtype, the last dim
            contiguous; lse ``[tokens, heads]`` fp32). o is not read where lse is -inf.
        out_THD: receives o in its dtype; may be one of the partials' o.
        lse_TH: contiguous, receives lse; a fresh one unless given; may be one of the partials'.

    Returns:
        lse, fp32 ``[tokens, heads]``.
    """
    tokens, heads, dim = out_THD.shape
    if lse_TH is None:
        lse_TH = torch.empty((tokens, heads), dtype=torch.float32, device=out_THD.device)
    rows = tokens * heads
    if rows == 0:
        return lse_TH
    os, lses = tuple(o for o, _ in partials), tuple(lse for _, lse in partials)
    merge_kernel[(triton.cdiv(rows, ROWS),)](
        os, lses, tuple(o.stride(0) for o in os), tuple(o.stride(1) for o in os),
        tuple(lse.stride(0) for lse in lses), tuple(lse.stride(1) for lse in lses),
        out_THD, lse_TH, out_THD.stride(0), out_THD.stride(1), rows,
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS, COUNT=len(os),
    )  # fmt: skip
    return lse_TH


@triton.jit
def merge_splits_kernel(
    o_splits, lse_splits, out, lse_out, rows, splits,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    some = row < rows
    there = some[:, None] & (column < DIM)[None, :]
    state = nothing(ROWS, BLOCK)
    for i in range(splits):
        at = row + i * rows
        lse = tl.load(lse_splits + at, mask=some, other=float("-inf"))
        o_at = at[:, None] * DIM + column[None, :]
        o = tl.load(o_splits + o_at, mask=there & (lse > float("-inf"))[:, None], other=0.0)
        state = fold(state, o, lse)
    at = row[:, None] * DIM + column[None, :]
    acc, largest, total = state
    tl.store(out + at, acc / tl.where(total == 0.0, 1.0, total)[:, None], mask=there)
    tl.store(lse_out + row, largest + tl.log(total), mask=some)


def merge_splits(o_SnTHD: Tensor, lse_SnTH: Tensor, out_THD: Tensor, lse_TH: Tensor) -> None:
    """Merge n partials that lie in one contiguous tensor, fp32, into contiguous (out, lse)."""
    splits, tokens, heads, dim = o_SnTHD.shape
    rows = tokens * heads
    if rows:
        merge_splits_kernel[(triton.cdiv(rows, ROWS),)](
            o_SnTHD, lse_SnTH, out_THD, lse_TH, rows, splits,
            DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS,
        )  # fmt: skip


@triton.jit
def pack_kernel(
    o, lse, index, packed_o, packed_lse, o_token, o_head, lse_token, lse_head, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INDEXED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    some = row < rows
    there = some[:, None] & (column < DIM)[None, :]
    token, head = row // HEADS, row % HEADS
    if INDEXED:
        token = tl.load(index + token, mask=some, other=0).to(tl.int64)
    found = tl.load(lse + token * lse_token + head * lse_head, mask=some, other=float("-inf"))
    at = (token * o_token + head * o_head)[:, None] + column[None, :]
    value = tl.load(o + at, mask=there & (found > float("-inf"))[:, None], other=0.0)
    to = row[:, None] * DIM + column[None, :]
    tl.store(packed_o + to, value.to(packed_o.dtype.element_ty), mask=there)
    tl.store(packed_lse + row, found, mask=some)


def pack_partial(
    o_THD: Tensor, lse_TH: Tensor, dtype: torch.dtype, index_N: Tensor | None = None
) -> Tensor:
    """Partials as one flat uint8 message: lse in fp32, then o rounded to `dtype`.

    It is the form of `sequence_parallel.exact.partials`, so that its `unpack` gives views of it.

    Args:
        o_THD, lse_TH: as in `merge_states`; o is not read where lse is -inf, 0 is sent.
        index_N: int32 or int64, the tokens to pack, in their order; all unless given.
    """
    tokens, heads, dim = o_THD.shape
    count = tokens if index_N is None else len(index_N)
    rows = count * heads
    message = torch.empty(rows * (4 + dim * dtype.itemsize), dtype=torch.uint8, device=o_THD.device)
    if rows:
        packed_lse, packed_o = message[: 4 * rows].view(torch.float32), message[4 * rows :]
        pack_kernel[(triton.cdiv(rows, ROWS),)](
            o_THD, lse_TH, index_N, packed_o.view(dtype), packed_lse,
            o_THD.stride(0), o_THD.stride(1), lse_TH.stride(0), lse_TH.stride(1), rows,
            HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS,
            INDEXED=index_N is not None,
        )  # fmt: skip
    return message

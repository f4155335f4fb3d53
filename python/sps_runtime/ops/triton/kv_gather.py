"""Pages into packed send buffers, and out of receive buffers: copies, bytes in and bytes out.

Units are (page, KV head) pairs, what sparse attention sends; whole pages with the tokens they hold
are `kvstore.transfer.Shipment`'s. Rows travel as they lie, quantised ones too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements of one program."""


@triton.jit
def unit_kernel(
    pool, packed, slots, heads, slot_stride, head_stride, ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Program (i, c): chunk c of unit i."""
    unit = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot, head = tl.load(slots + unit).to(tl.int64), tl.load(heads + unit).to(tl.int64)
    there = pool + slot * slot_stride + head * head_stride + at
    here = packed + unit * ELEMENTS + at
    mask = at < ELEMENTS
    if GATHER:
        tl.store(here, tl.load(there, mask=mask, other=0), mask=mask)
    else:
        tl.store(there, tl.load(here, mask=mask, other=0), mask=mask)


def gather_units(pool: Tensor, slots: Tensor, heads: Tensor) -> Tensor:
    """Copies of units, contiguous: ``[n, page_size, row]``.

    Args:
        pool: ``[slots, kv_heads, page_size, row]``, pages contiguous.
        slots, heads: integers ``[n]`` on the pool's device.
    """
    packed = pool.new_empty((len(slots), *pool.shape[2:]))
    _units(pool, packed, slots, heads, gather=True)
    return packed


def scatter_units(packed: Tensor, pool: Tensor, slots: Tensor, heads: Tensor) -> None:
    """Put units that arrived into a pool; arguments as in `gather_units`, units distinct."""
    _units(pool, packed, slots, heads, gather=False)


def _units(pool: Tensor, packed: Tensor, slots: Tensor, heads: Tensor, *, gather: bool) -> None:
    elements = pool.shape[2] * pool.shape[3]
    if len(slots):
        unit_kernel[(len(slots), triton.cdiv(elements, BLOCK))](
            pool, packed, slots, heads, pool.stride(0), pool.stride(1),
            ELEMENTS=elements, BLOCK=BLOCK, GATHER=gather,
        )  # fmt: skip


@triton.jit
def page_kernel(
    k, v, message, slots, tokens, starts, slot_stride, head_stride, heads, page,
    ROW: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (i, s, c): chunk c of one head's keys or values of page i. PACK copies the tokens it
    holds into the message; else out of it, and zeros behind them: a stray NaN times a weight of 0
    would be NaN."""
    index, head = tl.program_id(0), tl.program_id(1) % heads
    held = tl.load(tokens + index) * ROW
    begin = tl.load(starts + index) + tl.program_id(1).to(tl.int64) * held
    slot = index.to(tl.int64)
    if PACK:
        slot = tl.load(slots + index).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    side = k
    if tl.program_id(1) >= heads:
        side = v
    place = side + slot * slot_stride + head * head_stride + at
    if PACK:
        tl.store(message + begin + at, tl.load(place, mask=at < held, other=0), mask=at < held)
    else:
        moved = tl.load(message + begin + at, mask=at < held, other=0)
        tl.store(place, moved, mask=at < page * ROW)


def pack_pages(
    k: Tensor, v: Tensor, slots: Tensor, tokens: Tensor, starts: Tensor, message: Tensor,
    kv_heads: tuple[int, int],
) -> None:  # fmt: skip
    """Copy pages out of a layer's pools into one flat message, heads [begin, end) of them.

    Args:
        k, v: ``[slots, kv_heads, page_size, row]`` of equal strides, pages contiguous.
        slots, tokens: int32 ``[n]`` on the device: which pages, and how many tokens of each.
        starts: int64 ``[n]``: where each begins in `message`, in elements; keys of each head, then
            values of each head, ``[2, heads, tokens, row]``.
    """
    begin, end = kv_heads
    _pages(k[:, begin:end], v[:, begin:end], slots, tokens, starts, message, pack=True)


def spread_pages(message: Tensor, tokens: Tensor, starts: Tensor, k: Tensor, v: Tensor) -> None:
    """Put the pages of a message into slots 0, 1, ... of a staging pool, zeros behind the tokens
    that a page holds; `message` is apart from it, other arguments as in `pack_pages`."""
    _pages(k, v, tokens, tokens, starts, message, pack=False)


def _pages(
    k: Tensor, v: Tensor, slots: Tensor, tokens: Tensor, starts: Tensor, message: Tensor,
    *, pack: bool,
) -> None:  # fmt: skip
    _, heads, page, row = k.shape
    if len(tokens) == 0 or heads == 0:
        return
    page_kernel[(len(tokens), 2 * heads, triton.cdiv(page * row, BLOCK))](
        k, v, message, slots, tokens, starts, k.stride(0), k.stride(1), heads, page,
        ROW=row, BLOCK=BLOCK, PACK=pack,
    )  # fmt: skip

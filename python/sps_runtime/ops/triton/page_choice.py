"""From shares to the pages that each (query block, KV head) reads: `sparse.selection` on a device.

A program ranks all pages before a block in registers: a page's key is its share's bits, which order
as numbers do, above its place, so that keys are distinct, one sort settles ties as the reference
does (the earlier page first), and a threshold of keys says which pages are kept, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
"""Of a block in `table`: entry, pages before it, its pages (a short block's too), own pages of a
whole block, most, superblock, pages before that, whether it reads all."""
EXCLUDED = tl.constexpr(float("-inf"))


@triton.jit
def rank_keys(share, listed, NP: tl.constexpr):
    """Distinct int64 keys in ascending order of what is kept last; -1 where nothing is listed."""
    order = tl.where(share == EXCLUDED, 0, share.to(tl.int32, bitcast=True) + 1)
    place = NP - 1 - tl.arange(0, NP)
    return tl.where(listed, (order.to(tl.int64) << 32) | place.to(tl.int64), -1)


@triton.jit
def keep_pages(
    share, listed, pages, own, most, minimum, sink, window, tau,
    NP: tl.constexpr, BY_TAU: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Which of the first `pages` are kept (`sparse.selection.select`); share is -inf for those that
    must not be."""
    allowed = listed & (share > EXCLUDED)
    kept = allowed
    if not ALL:
        page = tl.arange(0, NP)
        always = allowed & ((page < sink) | (page >= pages - window))
        key = rank_keys(tl.where(always, float("inf"), share), listed, NP)
        ranked = tl.sort(key)
        count = most
        if BY_TAU:
            bits = ((ranked >> 32) - 1).to(tl.int32)
            counted = (bits >= 0) & (bits < 0x7F800000)
            rest = tl.cumsum(tl.where(counted, bits, 0).to(tl.float32, bitcast=True), 0)
            count = tl.minimum(most, tl.sum((rest > tau).to(tl.int32), axis=0))
        else:
            count = tl.minimum(most, pages)
        least = tl.maximum(tl.sum(always.to(tl.int32), axis=0), minimum - own)
        count = tl.minimum(tl.maximum(count, least), pages)
        limit = tl.sum(tl.where(page == NP - count, ranked, 0), axis=0)
        kept = allowed & (key >= limit) & (count > 0)
    return kept


@triton.jit
def common_kernel(
    shares, table, members, common, kv_heads, share_item, minimum, sink, window, tau,
    NP: tl.constexpr, BY_TAU: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Program (s, h): the pages before superblock s that its blocks may choose from, for KV head h.
    `members`: first block, blocks, most of each superblock."""
    superblock, head = tl.program_id(0), tl.program_id(1)
    first, blocks = tl.load(members + superblock * 3), tl.load(members + superblock * 3 + 1)
    most = tl.load(members + superblock * 3 + 2)
    before = tl.load(table + first * FIELDS + 6)
    page = tl.arange(0, NP)
    listed = page < before
    squares = tl.zeros([NP], tl.float32)
    for block in range(first, first + blocks):
        at = (block * kv_heads + head).to(tl.int64) * share_item + page
        share = tl.load(shares + at, mask=listed, other=0.0)
        squares += share * share
    kept = keep_pages(
        tl.sqrt(squares), listed, before, 0, most, minimum, sink, window, tau, NP, BY_TAU, ALL
    )
    to = common + (superblock * kv_heads + head).to(tl.int64) * NP + page
    tl.store(to, kept.to(tl.uint8), mask=listed)


@triton.jit
def keep_kernel(
    shares, table, common, keep, counts, kv_heads, share_item, minimum, sink, window, tau,
    NP: tl.constexpr, BY_TAU: tl.constexpr, ALL: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Program i: which pages item i keeps, and how many."""
    item = tl.program_id(0)
    row = table + item // kv_heads * FIELDS
    before, own, most = tl.load(row + 1), tl.load(row + 3), tl.load(row + 4)
    page = tl.arange(0, NP)
    listed = page < before
    share = tl.load(shares + item.to(tl.int64) * share_item + page, mask=listed, other=0.0)
    if NARROW:
        superblock, wide = tl.load(row + 5), tl.load(row + 6)
        at = (superblock * kv_heads + item % kv_heads).to(tl.int64) * NP + page
        allowed = tl.load(common + at, mask=page < wide, other=1)
        share = tl.where(allowed != 0, share, EXCLUDED)
    kept = keep_pages(share, listed, before, own, most, minimum, sink, window, tau, NP, BY_TAU, ALL)
    kept = tl.where(tl.load(row + 7) != 0, listed, kept)
    tl.store(keep + item.to(tl.int64) * NP + page, kept.to(tl.uint8), mask=listed)
    tl.store(counts + item, tl.sum(kept.to(tl.int32), axis=0))


@triton.jit
def list_kernel(
    table, page_ids, keep, begins, out_ids, out_positions, dropped_begins, dropped_ids, kv_heads,
    page_size, NP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program i: item i's lists, kept pages and the block's own in order, dropped ones beside."""
    item = tl.program_id(0)
    row = table + item // kv_heads * FIELDS
    entry, before, own = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    to, dropped_to = tl.load(begins + item), tl.load(dropped_begins + item)
    for first in range(0, before + own, CHUNK):
        page = first + tl.arange(0, CHUNK)
        listed = page < before + own
        kept = tl.load(keep + item.to(tl.int64) * NP + page, mask=page < before, other=1)
        kept = (kept != 0) & listed
        gone = (kept == 0) & listed
        ids = tl.load(page_ids + entry + page, mask=listed, other=0)
        at = to + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out_ids + at, ids, mask=kept)
        tl.store(out_positions + at, page * page_size, mask=kept)
        dropped_at = dropped_to + tl.cumsum(gone.to(tl.int32), 0) - 1
        tl.store(dropped_ids + dropped_at, ids, mask=gone)
        to += tl.sum(kept.to(tl.int32), axis=0)
        dropped_to += tl.sum(gone.to(tl.int32), axis=0)

"""Partial attention over lists of pages: dense, causal, sparse, and decode: one kernel.

The algorithm is FlashAttention-2's (Dao 2023), pages are PagedAttention's (Kwon et al. 2023), the
query heads of a KV head are folded into rows, and long lists of few rows are split and merged
(flash-decoding, Dao et al. 2023).

A list serves a block of queries and a range of KV heads. The pages that all of a tile's queries see
whole come first in most lists and go through a loop without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sps_runtime.ops.triton.fp8 import from_e4m3
from sps_runtime.ops.triton.pools import page_pointer

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SCAN = tl.constexpr(64)


@triton.jit
def load_rows(base, key, there, D: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr,
              FORMAT: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Rows ``key [n]`` of a page as ``[n, BLOCK_D]`` of `dtype`; 0 where they are not `there`:
    what was never written may be NaN, and NaN times a weight of 0 is NaN."""
    column = tl.arange(0, BLOCK_D)
    at = base + key[:, None] * ROW + column[None, :]
    if MASKED:
        rows = tl.load(at, mask=there[:, None] & (column < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=(column < D)[None, :], other=0.0)
    if FORMAT == 1:
        rows = from_e4m3(rows)
    if FORMAT == 2:
        scales = (base + key * ROW + D).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales, mask=there, other=0.0) if MASKED else tl.load(scales)
        rows = rows.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
    return rows.to(dtype)


@triton.jit
def attend_pages(
    state, q, position, pools, lists, low, high, sizes,
    D: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, FORMAT: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Entries [low, high) of a list onto ``state = (acc, largest, total)``, base 2."""
    acc, largest, total = state
    k_base, v_base, k_offsets, v_offsets, slots_per_rank, slot_stride = pools
    page_ids, page_positions = lists
    kv_len, window, scale = sizes
    inner: tl.constexpr = PAGE // BLOCK_N
    for step in range(low * inner, high * inner):
        entry = step // inner
        key = step % inner * BLOCK_N + tl.arange(0, BLOCK_N)
        page_id = tl.load(page_ids + entry)
        k_page = page_pointer(k_base, k_offsets, page_id, slots_per_rank, slot_stride)
        v_page = page_pointer(v_base, v_offsets, page_id, slots_per_rank, slot_stride)
        at = tl.load(page_positions + entry) + key
        there = at < kv_len
        k = load_rows(k_page, key, there, D, ROW, BLOCK_D, FORMAT, MASKED, q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & there[None, :]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above) if MASKED else above
        weight = tl.exp2(score - base[:, None])
        kept = tl.exp2(largest - base)
        total = total * kept + tl.sum(weight, axis=1)
        v = load_rows(v_page, key, there, D, ROW, BLOCK_D, FORMAT, MASKED, q.dtype)
        acc = tl.dot(weight.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        largest = above
    return acc, largest, total


@triton.jit
def seen_entries(
    page_positions, begin, count, first, last, kv_len, window,
    PAGE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(low, whole, high): entries outside [low, high) are seen by no query at `first` to `last`,
    those in [low, whole) by all of them and whole."""
    low, high, hole = begin + count, begin, begin + count
    for at in range(begin, begin + count, SCAN):
        entry = at + tl.arange(0, SCAN)
        listed = entry < begin + count
        start = tl.load(page_positions + entry, mask=listed, other=2147483000)
        seen = listed & (start <= last) & (start < kv_len)
        whole = (start + PAGE - 1 <= first) & (start + PAGE <= kv_len)
        if WINDOW:
            seen = seen & (start + PAGE - 1 > first - window)
            whole = whole & (start > last - window)
        low = tl.minimum(low, tl.min(tl.where(seen, entry, begin + count), axis=0))
        high = tl.maximum(high, tl.max(tl.where(seen, entry + 1, begin), axis=0))
        cut = listed & (entry >= low) & (whole == 0)
        hole = tl.minimum(hole, tl.min(tl.where(cut, entry, begin + count), axis=0))
    high = tl.maximum(high, low)
    return low, tl.minimum(tl.maximum(hole, low), high), high


@triton.jit
def attention_kernel(
    q, k_base, v_base, k_offsets, v_offsets, items, page_ids, page_positions, out, lse,
    q_token, q_head, slots_per_rank, slot_stride, head_stride, out_split, lse_split, heads,
    scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
    WINDOW: tl.constexpr, KV_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (w, i, s): tiles w, w + programs, ... of item i (tiles of all its KV heads, the last
    first, since causal ones grow), over split s of the pages that each sees."""
    item = items + tl.program_id(1) * 8
    row, rows, first_position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    begin, count, kv_len = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    kv_first, kv_count = tl.load(item + 6), tl.load(item + 7)
    tiles = tl.cdiv(rows * GROUP, BLOCK_M)
    split = tl.program_id(2)
    for work in range(tl.program_id(0), tiles * kv_count, tl.num_programs(0)):
        tile = tiles - 1 - work // kv_count
        kv_head = kv_first + work % kv_count
        folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token, column = folded // GROUP, tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + folded % GROUP
        some = token < rows
        q_at = (row + token).to(tl.int64) * q_token + head * q_head
        there = some[:, None] & (column < D)[None, :]
        queries = tl.load(q + q_at[:, None] + column[None, :], mask=there, other=0.0)
        position = first_position + token
        first = first_position + tile * BLOCK_M // GROUP
        last = first_position + tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP, rows - 1)
        low, whole, high = seen_entries(
            page_positions, begin, count, first, last, kv_len, window, PAGE, WINDOW
        )
        if KV_SPLITS > 1:
            each = tl.cdiv(high - low, KV_SPLITS)
            low = tl.minimum(low + split * each, high)
            high = tl.minimum(low + each, high)
            whole = tl.minimum(tl.maximum(whole, low), high)
        pools = (
            k_base + kv_head * head_stride, v_base + kv_head * head_stride, k_offsets, v_offsets,
            slots_per_rank, slot_stride,
        )  # fmt: skip
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        state = (acc, largest, tl.zeros([BLOCK_M], tl.float32))
        lists, sizes = (page_ids, page_positions), (kv_len, window, scale * LOG2_E)
        state = attend_pages(
            state, queries, position, pools, lists, low, whole, sizes, D, ROW, BLOCK_D, BLOCK_N,
            PAGE, FORMAT, WINDOW, False, PRECISION,
        )  # fmt: skip
        acc, largest, total = attend_pages(
            state, queries, position, pools, lists, whole, high, sizes, D, ROW, BLOCK_D, BLOCK_N,
            PAGE, FORMAT, WINDOW, True, PRECISION,
        )  # fmt: skip
        cell = (row + token).to(tl.int64) * heads + head
        o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_at = out + split.to(tl.int64) * out_split + cell[:, None] * D + column[None, :]
        tl.store(o_at, o.to(out.dtype.element_ty), mask=there)
        found = (largest + tl.log2(total)) * LN_2
        tl.store(lse + split.to(tl.int64) * lse_split + cell, found, mask=some)

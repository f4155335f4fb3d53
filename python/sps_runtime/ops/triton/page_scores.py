"""What share of a query block's attention each page before it would get, from the pages' sketches.

A key is sketched as low + code * step, so q.key = q.low + (q * step).code: one product a page, and
one of the page's codes, 0 to 3, which any format of a tensor core holds without rounding. Codes lie
four channels a byte, so a product goes by four strided quarters of the channels and nothing has to
be moved within a register file. In bf16 models q * step is rounded to half precision, whose 11 bits
move a score by less than the sketch does by a hundredth.

Masses go through a workspace, blocks at a time, so that it stays in the L2 cache; then each row's
total over all pages and its own block makes shares of them, and a page's share is the norm over
rows and heads (`sparse.selection.page_shares`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sps_runtime.ops.triton.pools import page_pointer

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(6)
"""Of a block's row in `blocks`: first row, rows, scored rows, first entry, pages before it, 0."""


@triton.jit
def scored_tokens(block, folded, GROUP: tl.constexpr):
    """(token within the block, whether it is scored) of folded rows ``r * GROUP + head``: evenly
    spaced tokens, the last among them."""
    rows, scored = tl.load(block + 1), tl.load(block + 2)
    r = folded // GROUP
    return (r + 1) * rows // tl.maximum(scored, 1) - 1, r < scored


@triton.jit
def mass_kernel(
    q, blocks, page_ids, blobs, offsets, masses, q_token, q_head, slots_per_rank, slot_stride,
    head_stride, kv_heads, mass_item, mass_row, scale,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    PAGES: tl.constexpr, QUARTER: tl.constexpr, BLOCK_P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Program (t, r, i): log masses of pages t * PAGES ... for a tile r of rows of item i, which is
    KV head i % kv_heads of a block."""
    item = tl.program_id(2)
    block, head = blocks + item // kv_heads * FIELDS, item % kv_heads
    before, entry = tl.load(block + 4), tl.load(block + 3)
    first = tl.program_id(0) * PAGES
    folded = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, some = scored_tokens(block, folded, GROUP)
    if first < before and tl.program_id(1) * ROWS < tl.load(block + 2) * GROUP:
        quad, column = tl.arange(0, QUARTER), tl.arange(0, PAGES)
        row = (tl.load(block) + token).to(tl.int64) * q_token
        at = (row + (head * GROUP + folded % GROUP) * q_head)[:, None] + 4 * quad[None, :]
        there = some[:, None] & (quad < D // 4)[None, :]
        q0 = tl.load(q + at, mask=there, other=0.0)
        q1 = tl.load(q + at + 1, mask=there, other=0.0)
        q2 = tl.load(q + at + 2, mask=there, other=0.0)
        q3 = tl.load(q + at + 3, mask=there, other=0.0)
        ids = tl.load(page_ids + entry + first + column, mask=first + column < before, other=-1)
        summaries = blobs + head * head_stride
        far = page_pointer(summaries, offsets, tl.maximum(ids, 0), slots_per_rank, slot_stride)
        low = far.to(tl.pointer_type(q.dtype.element_ty))[None, :] + 2 * D + 4 * quad[:, None]
        shown = (ids >= 0)[None, :] & (quad < D // 4)[:, None]
        base = tl.dot(q0, tl.load(low, mask=shown, other=0.0), input_precision="ieee")
        base = tl.dot(q1, tl.load(low + 1, mask=shown, other=0.0), base, input_precision="ieee")
        base = tl.dot(q2, tl.load(low + 2, mask=shown, other=0.0), base, input_precision="ieee")
        base = tl.dot(q3, tl.load(low + 3, mask=shown, other=0.0), base, input_precision="ieee")
        found = tl.full([ROWS, PAGES], float("-inf"), tl.float32)
        unit = scale * LOG2_E
        for p in range(0, tl.minimum(PAGES, before - first)):
            page_id = tl.load(page_ids + entry + first + p)
            blob = page_pointer(summaries, offsets, page_id, slots_per_rank, slot_stride)
            score = sketched_scores(blob, (q0, q1, q2, q3), unit, D, PAGE, QUARTER, BLOCK_P, KIND)
            here = column[None, :] == p
            score += tl.sum(tl.where(here, base, 0.0), axis=1)[:, None] * unit
            largest = tl.max(score, axis=1)
            mass = largest + tl.log2(tl.sum(tl.exp2(score - largest[:, None]), axis=1))
            found = tl.where(here, mass[:, None] * LN_2, found)
        to = item.to(tl.int64) * mass_item + folded[:, None] * mass_row + first + column[None, :]
        tl.store(masses + to, found, mask=some[:, None] & (first + column < before)[None, :])


@triton.jit
def sketched_scores(
    blob, quarters, unit, D: tl.constexpr, PAGE: tl.constexpr, QUARTER: tl.constexpr,
    BLOCK_P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(q * step).code of every key of a page, times `unit`; -inf beyond the page. KIND is the dtype
    of the products."""
    q0, q1, q2, q3 = quarters
    quad, key = tl.arange(0, QUARTER), tl.arange(0, BLOCK_P)
    vectors = blob.to(tl.pointer_type(q0.dtype))
    step, kept = vectors + 3 * D + 4 * quad, quad < D // 4
    codes = blob + 4 * D * (q0.dtype.primitive_bitwidth // 8)
    at = key[None, :] * (D // 4) + quad[:, None]
    packed = tl.load(codes + at, mask=kept[:, None] & (key < PAGE)[None, :], other=0).to(tl.int32)
    s0 = tl.load(step, mask=kept, other=0.0).to(tl.float32) * unit
    s1 = tl.load(step + 1, mask=kept, other=0.0).to(tl.float32) * unit
    s2 = tl.load(step + 2, mask=kept, other=0.0).to(tl.float32) * unit
    s3 = tl.load(step + 3, mask=kept, other=0.0).to(tl.float32) * unit
    c0, c1 = (packed & 3).to(KIND), (packed >> 2 & 3).to(KIND)
    c2, c3 = (packed >> 4 & 3).to(KIND), (packed >> 6).to(KIND)
    score = tl.dot((q0.to(tl.float32) * s0[None, :]).to(KIND), c0, input_precision="ieee")
    score = tl.dot((q1.to(tl.float32) * s1[None, :]).to(KIND), c1, score, input_precision="ieee")
    score = tl.dot((q2.to(tl.float32) * s2[None, :]).to(KIND), c2, score, input_precision="ieee")
    score = tl.dot((q3.to(tl.float32) * s3[None, :]).to(KIND), c3, score, input_precision="ieee")
    return tl.where((key < PAGE)[None, :], score, float("-inf"))


@triton.jit
def total_kernel(
    q, blocks, page_ids, k_base, offsets, masses, totals, q_token, q_head, slots_per_rank,
    slot_stride, head_stride, kv_heads, mass_item, mass_row, scale,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Program (r, i): log of all that rows of item i attend to: their own block's keys up to
    themselves, exactly, and the masses of the pages before it."""
    item = tl.program_id(1)
    block, head = blocks + item // kv_heads * FIELDS, item % kv_heads
    rows, before, entry = tl.load(block + 1), tl.load(block + 4), tl.load(block + 3)
    folded = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, some = scored_tokens(block, folded, GROUP)
    column, key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    row = (tl.load(block) + token).to(tl.int64) * q_token
    q_at = (row + (head * GROUP + folded % GROUP) * q_head)[:, None] + column[None, :]
    queries = tl.load(q + q_at, mask=some[:, None] & (column < D)[None, :], other=0.0)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for own in range(0, tl.cdiv(rows, PAGE)):
        page_id = tl.load(page_ids + entry + before + own)
        page = page_pointer(
            k_base + head * head_stride, offsets, page_id, slots_per_rank, slot_stride
        )
        at = own * PAGE + key
        there = (key < PAGE) & (at < rows)
        keys = tl.load(
            page + key[None, :] * D + column[:, None],
            mask=there[None, :] & (column < D)[:, None], other=0.0,
        )  # fmt: skip
        score = tl.dot(queries, keys, input_precision="ieee") * scale
        score = tl.where(there[None, :] & (at[None, :] <= token[:, None]), score, float("-inf"))
        largest, total = add_masses(largest, total, score)
    mass = masses + item.to(tl.int64) * mass_item + folded[:, None] * mass_row
    for first in range(0, before, PAGES):
        page = first + tl.arange(0, PAGES)
        seen = some[:, None] & (page < before)[None, :]
        found = tl.load(mass + page[None, :], mask=seen, other=float("-inf"))
        largest, total = add_masses(largest, total, found)
    to = totals + item.to(tl.int64) * mass_item // mass_row + folded
    tl.store(to, largest + tl.log(total), mask=some)


@triton.jit
def add_masses(largest, total, found):
    """Log masses ``[rows, n]`` onto a running sum of exponentials."""
    above = tl.maximum(largest, tl.max(found, axis=1))
    base = tl.where(above == float("-inf"), 0.0, above)
    total = total * tl.exp(largest - base) + tl.sum(tl.exp(found - base[:, None]), axis=1)
    return above, total


@triton.jit
def share_kernel(
    blocks, masses, totals, shares, kv_heads, mass_item, mass_row, share_item,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Program (t, i): the norm over rows of pages' shares."""
    item = tl.program_id(1)
    block = blocks + item // kv_heads * FIELDS
    scored, before = tl.load(block + 2) * GROUP, tl.load(block + 4)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    squares = tl.zeros([PAGES], tl.float32)
    for first in range(0, scored, ROWS):
        row = first + tl.arange(0, ROWS)
        seen = (row < scored)[:, None] & (page < before)[None, :]
        at = masses + item.to(tl.int64) * mass_item + row[:, None] * mass_row + page[None, :]
        mass = tl.load(at, mask=seen, other=float("-inf"))
        of = totals + item.to(tl.int64) * mass_item // mass_row + row
        share = tl.exp(mass - tl.load(of, mask=row < scored, other=0.0)[:, None])
        squares += tl.sum(share * share, axis=0)
    to = shares + item.to(tl.int64) * share_item + page
    tl.store(to, tl.sqrt(squares), mask=page < before)

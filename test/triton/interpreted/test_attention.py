"""Paged attention against one softmax over all keys: any pages of any rank, what was never written
is NaN, rows in no list stay empty."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.triton import TritonBackend
from sps_runtime.ops import kv_rows, reference
from sps_runtime.ops.triton.attention import Sizes

SLOTS, RANKS, DIM, SCALE = 24, 2, 24, 0.3
CELLS = [
    (page, window, heads, share, count, start)
    for page, window, heads, share, (count, start) in itertools.product(
        (16, 64), (None, 9, 100), ((4, 2), (6, 1)), (None, (0, 1)), ((1, 90), (40, 0), (33, 50))
    )
]
random.Random(2).shuffle(CELLS)


@dataclass
class Case:
    """A sequence whose pages lie anywhere in two ranks' pools; all else there is NaN."""

    k: list[Tensor]
    v: list[Tensor]
    ids: Tensor
    starts: Tensor
    length: int
    page: int
    dtype: torch.dtype

    @classmethod
    def make(cls, length: int, kv_heads: int, page: int, dtype: torch.dtype, fmt: str) -> Case:
        row = DIM + (kv_rows.SCALE_BYTES if fmt == "int8" else 0)
        stored = kv_rows.storage_dtype(fmt, dtype)
        poison = 255 if stored == torch.uint8 else torch.nan
        shape = (RANKS, SLOTS, kv_heads, page, row)
        sides = [torch.full(shape, poison, dtype=stored) for _ in range(2)]
        total = -(-length // page)
        ids = torch.randperm(RANKS * SLOTS)[:total].int()
        for at, page_id in enumerate(ids.tolist()):
            used = min(page, length - at * page)
            for side in sides:
                x = torch.randn(kv_heads, used, DIM).to(dtype)
                side.view(-1, *shape[2:])[page_id, :, :used] = kv_rows.encode(x, fmt)
        starts = torch.arange(total, dtype=torch.int32) * page
        return cls(*(list(side.unbind()) for side in sides), ids, starts, length, page, dtype)

    @property
    def pool(self) -> PagePool:
        return PagePool(self.k, self.v, SLOTS)

    def dense(self, share: tuple[int, int] | None = None) -> list[Tensor]:
        """K and V ``[tokens, kv_heads, head_dim]`` as attention reads them."""
        return [
            kv_rows.decode(rows, kv_rows.row_format(rows, DIM), self.dtype)
            for rows in (
                reference.gather_pages(side, SLOTS, self.ids, self.length)[
                    :, slice(*(share or (None,)))
                ]
                for side in (self.k, self.v)
            )
        ]


def close(got: Partial, o: Tensor, lse: Tensor, dtype: torch.dtype) -> None:
    assert got.o.dtype == got.lse.dtype == torch.float32
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.o, o, rtol=0, atol=bound)
    torch.testing.assert_close(got.lse, lse, rtol=0, atol=bound)


def check(cell: tuple, dtype: torch.dtype, fmt: str, processors: int) -> None:
    page, window, (heads, kv_heads), share, count, start = cell
    case = Case.make(start + count, kv_heads, page, dtype, fmt)
    keep = torch.rand(len(case.ids)) < 0.7
    heads = heads if share is None else heads // kv_heads * (share[1] - share[0])
    q = torch.randn(count + 5, heads + 1, DIM).to(dtype)[:, :heads]
    run = QueryRun(3, count, start, case.ids[keep], case.starts[keep], case.length)
    backend = TritonBackend(processors)
    got = backend.partial(q, [run], case.pool, scale=SCALE, window=window, kv_heads=share)
    keys = torch.arange(case.length)[keep.repeat_interleave(page)[: case.length]]
    k, v = (side[keys] for side in case.dense(share))
    rows = slice(3, 3 + count)
    o, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    o[rows], lse[rows] = reference.attention(
        q[rows], k, v, torch.arange(start, case.length), keys, scale=SCALE, window=window
    )
    close(got, o, lse, dtype)


@pytest.mark.parametrize("cell", CELLS[:12], ids=str)
def test_any_pages(cell: tuple) -> None:
    check(cell, torch.float32, "native", processors=1)


@pytest.mark.parametrize("fmt", ["native", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("cell", CELLS[12:15], ids=str)
def test_formats_of_rows_in_bf16(cell: tuple, fmt: str) -> None:
    check(cell, torch.bfloat16, fmt, processors=1)


def test_bf16_heads_that_fill_a_block() -> None:
    """head_dim 32 of blocks of 32: no lanes beyond it."""
    q, kv = torch.randn(5, 2, 32).bfloat16(), torch.randn(2, 3, 1, 16, 32).bfloat16()
    lists = torch.tensor([2, 0, 1]).int(), torch.tensor([0, 16, 32]).int()
    run = QueryRun(0, 5, 40, *lists, 45)
    got = TritonBackend().partial(q, [run], PagePool([kv[0]], [kv[1]], 3), scale=SCALE)
    k, v = (reference.gather_pages([side], 3, lists[0], 45) for side in kv)
    want = reference.attention(q, k, v, torch.arange(40, 45), torch.arange(45), scale=SCALE)
    close(got, *want, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 700])
def test_long_lists_are_split_and_merged(window: int | None) -> None:
    """Decode: a batch of single queries, one of which saw nothing, on a device of many processors;
    a row in no run stays empty."""
    case = Case.make(1200, 2, 64, torch.float32, "native")
    q = torch.randn(4, 4, DIM)
    runs = [
        QueryRun(0, 1, 1199, case.ids, case.starts, 1200),
        QueryRun(2, 1, 700, case.ids[:11], case.starts[:11], 701),
        QueryRun(3, 1, 5, case.ids[:0], case.starts[:0], 6),
    ]
    got = TritonBackend(32).partial(q, runs, case.pool, scale=SCALE, window=window)
    o, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    k, v = case.dense()
    for run in runs[:2]:
        row, keys = slice(run.row, run.row + 1), torch.arange(run.kv_len)
        o[row], lse[row] = reference.attention(
            q[row], k[keys], v[keys], torch.tensor([run.position]), keys, scale=SCALE, window=window
        )
    close(got, o, lse, torch.float32)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("guessed", [False, True])
def test_a_list_for_each_block_and_kv_head(window: int | None, guessed: bool) -> None:
    """Random lists in random order; some are empty, and one (block, head) is in no item."""
    kv_heads, group, start, count, block, rng = 2, 3, 100, 90, 32, random.Random(window)
    case = Case.make(start + count, kv_heads, 16, torch.float32, "native")
    q = torch.randn(count, kv_heads * group, DIM)
    o, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    k, v = case.dense()
    items, chosen = [], []
    for row, head in itertools.product(range(0, count, block), range(kv_heads)):
        if (row, head) == (block, 1):
            continue
        rows, total = min(block, count - row), len(case.ids)
        pages = rng.sample(range(total), rng.choice((0, 3, total)))
        items.append((row, rows, start + row, len(chosen), len(pages), case.length, head, 1))
        chosen += pages
        keys = [i for p in sorted(pages) for i in range(p * 16, min(case.length, p * 16 + 16))]
        at = torch.tensor(keys, dtype=torch.int64)
        cut = (slice(row, row + rows), slice(head * group, (head + 1) * group))
        one = slice(head, head + 1)
        o[cut], lse[cut] = reference.attention(
            q[cut], k[at, one], v[at, one], torch.arange(start, start + count)[cut[0]], at,
            scale=SCALE, window=window,
        )  # fmt: skip
    lists = PageLists(torch.tensor(items, dtype=torch.int32), case.ids[chosen], case.starts[chosen])
    backend = TritonBackend(1)
    if guessed:  # as for items on a device
        backend._sizes = lambda *_: _guess()  # type: ignore[method-assign]
    got = backend.partial_lists(q, lists, case.pool, scale=SCALE, window=window)
    close(got, o, lse, torch.float32)


def _guess() -> Sizes:
    return Sizes(rows=5, kv_heads=1, pages=1, processors=1)


def test_no_queries_and_no_runs() -> None:
    pool = PagePool([torch.zeros(2, 2, 16, 16)], [torch.zeros(2, 2, 16, 16)], 2)
    backend = TritonBackend()
    assert backend.partial(torch.zeros(0, 4, 16), [], pool, scale=1.0).o.shape == (0, 4, 16)
    unseen = backend.partial(torch.zeros(2, 4, 16), [], pool, scale=1.0)
    assert (unseen.o == 0).all() and unseen.lse.isneginf().all()


def test_a_pool_that_cannot_be_read_may_stand_anywhere() -> None:
    empty, some = torch.zeros(0, 1, 16, 8), torch.randn(3, 1, 16, 8)
    run = QueryRun(0, 1, 20, torch.tensor([4], dtype=torch.int32), torch.tensor([0]).int(), 21)
    pool = PagePool([empty, some], [empty, some], 3)
    got = TritonBackend().partial(torch.randn(1, 1, 8), [run], pool, scale=1.0)
    assert got.o.isfinite().all() and got.lse.isfinite().all()


def test_partials_merge_into_a_strided_output() -> None:
    parts = [Partial(torch.randn(5, 4, 8), torch.randn(5, 4)) for _ in range(3)]
    out = torch.zeros(5, 6, 8)
    TritonBackend().merge(parts, out[:, 1:5])
    want, _ = reference.merge(
        torch.stack([p.o for p in parts]), torch.stack([p.lse for p in parts])
    )
    torch.testing.assert_close(out[:, 1:5], want.float(), rtol=0, atol=1e-5)
    assert (out[:, 0] == 0).all() and (out[:, 5] == 0).all()

"""Backends against one softmax over all keys, o and lse, over any subset of pages."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from test.kit.fake_flashinfer import FakeFlashInfer

from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool, QueryRun
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops import reference

SLOTS = 40
CELLS = list(
    itertools.product(
        (16, 64), (None, 1, 9, 100), ((4, 2), (4, 4), (6, 1)), (None, (0, 1)), (1, 3, 600), (0, 50)
    )
)
random.Random(1).shuffle(CELLS)


def backend_of(name: str) -> AttentionBackend:
    if name == "torch":
        return TorchBackend()
    if name == "flashinfer":
        return FlashInferBackend(FakeFlashInfer(), TorchBackend(), torch.device("cpu"))
    return KernelBackend(pytest.importorskip("sps_kernel"))


def check(backend: AttentionBackend, cell: tuple, seed: int, dtype: torch.dtype) -> None:
    page, window, (heads, kv_heads), share, count, start = cell
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    dim, length = 16, start + count
    sides = [
        [torch.randn(SLOTS, kv_heads, page, dim, generator=generator).to(dtype) for _ in range(2)]
        for _ in range(2)
    ]
    total = -(-length // page)
    ids = torch.tensor(rng.sample(range(2 * SLOTS), total), dtype=torch.int32)
    keep = torch.tensor([rng.random() < 0.7 for _ in range(total)])
    starts = torch.arange(total, dtype=torch.int32) * page
    heads = heads if share is None else heads // kv_heads * (share[1] - share[0])
    q = torch.randn(count + 5, heads, dim, generator=generator).to(dtype)
    run = QueryRun(3, count, start, ids[keep], starts[keep], length)
    pool = PagePool(sides[0], sides[1], SLOTS)
    got = backend.partial(q, [run], pool, scale=0.25, window=window, kv_heads=share)

    k, v = (
        reference.gather_pages(side, SLOTS, ids, length)[:, slice(*(share or (None,)))]
        for side in sides
    )
    keys = torch.arange(length)[keep.repeat_interleave(page)[:length]]
    positions = torch.arange(start, length)
    o, lse = reference.attention(
        q[3 : 3 + count], k[keys], v[keys], positions, keys, scale=0.25, window=window
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.o[3 : 3 + count], o, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.lse[3 : 3 + count], lse, rtol=0, atol=tolerance)
    others = torch.ones(count + 5, dtype=torch.bool)
    others[3 : 3 + count] = False
    assert (got.o[others] == 0).all() and got.lse[others].isneginf().all()


@pytest.mark.parametrize("name", ["torch", "sps_kernel", "flashinfer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partials_over_any_pages(name: str, dtype: torch.dtype) -> None:
    backend = backend_of(name)
    for seed, cell in enumerate(CELLS[:100]):
        check(backend, cell, seed, dtype)


@pytest.mark.parametrize("name", ["torch", "sps_kernel", "flashinfer"])
def test_no_queries_and_no_runs(name: str) -> None:
    backend = backend_of(name)
    pool = PagePool([torch.zeros(2, 2, 16, 16)], [torch.zeros(2, 2, 16, 16)], 2)
    none = backend.partial(torch.zeros(0, 4, 16), [], pool, scale=1.0)
    assert none.o.shape == (0, 4, 16) and none.lse.shape == (0, 4)
    unseen = backend.partial(torch.zeros(2, 4, 16), [], pool, scale=1.0)
    assert (unseen.o == 0).all() and unseen.lse.isneginf().all()


@pytest.mark.parametrize("name", ["torch", "sps_kernel", "flashinfer"])
def test_a_pool_that_cannot_be_read_may_stand_anywhere(name: str) -> None:
    backend = backend_of(name)
    empty, some = torch.zeros(0, 1, 16, 8), torch.randn(3, 1, 16, 8)
    run = QueryRun(0, 1, 20, torch.tensor([4], dtype=torch.int32), torch.tensor([0]).int(), 21)
    got = backend.partial(
        torch.randn(1, 1, 8), [run], PagePool([empty, some], [empty, some], 3), scale=1.0
    )
    assert got.o.isfinite().all() and got.lse.isfinite().all()


@pytest.mark.parametrize("name", ["torch", "sps_kernel", "flashinfer"])
@pytest.mark.parametrize("window", [None, 70])
def test_a_list_for_each_block_and_kv_head(name: str, window: int | None) -> None:
    """Random lists in random order; some are empty, and one (block, head) is in no item."""
    backend, rng = backend_of(name), random.Random(window)
    generator = torch.Generator().manual_seed(5)
    page, dim, kv_heads, group, start, count, block = 16, 16, 2, 3, 100, 90, 32
    length = start + count
    total = -(-length // page)
    k, v = (torch.randn(SLOTS, kv_heads, page, dim, generator=generator) for _ in range(2))
    slots = rng.sample(range(SLOTS), total)
    q = torch.randn(count, kv_heads * group, dim, generator=generator)
    items, chosen, want = [], [], []
    for row in range(0, count, block):
        rows = min(block, count - row)
        for head in range(kv_heads):
            if (row, head) == (block, 1):
                continue
            pages = rng.sample(range(total), rng.choice((0, 3, total)))
            items.append((row, rows, start + row, len(chosen), len(pages), length, head, 1))
            chosen += pages
            want.append((slice(row, row + rows), head, sorted(pages)))
    lists = PageLists(
        torch.tensor(items, dtype=torch.int32),
        torch.tensor([slots[page] for page in chosen], dtype=torch.int32),
        torch.tensor(chosen, dtype=torch.int32) * page,
    )
    got = backend.partial_lists(q, lists, PagePool([k], [v], SLOTS), scale=0.25, window=window)
    o, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    whole = torch.tensor(slots, dtype=torch.int32)
    sides = [reference.gather_pages([side], SLOTS, whole, length) for side in (k, v)]
    for rows, head, pages in want:
        keys = torch.tensor(
            [i for p in pages for i in range(p * page, min(length, p * page + page))]
        )
        keys, cut = keys.long(), (rows, slice(head * group, (head + 1) * group))
        o[cut], lse[cut] = reference.attention(
            q[cut], *(side[keys, head : head + 1] for side in sides),
            torch.arange(start, length)[rows], keys, scale=0.25, window=window,
        )  # fmt: skip
    torch.testing.assert_close(got.o, o, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse, lse, rtol=0, atol=1e-5)

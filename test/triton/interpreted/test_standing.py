"""Page lists that stay while their values change: what a recorded decode step reads."""

from __future__ import annotations

import numpy as np
import torch

from sps_runtime.attention.backend import PageLists, PagePool
from sps_runtime.attention.triton import TritonBackend

PAGE, SLOTS, ROWS, ROOM = 16, 24, 3, 40


def fill(items: np.ndarray, ids: np.ndarray, starts: np.ndarray, lengths: list[int]) -> None:
    rng, at = np.random.default_rng(sum(lengths)), 0
    for row, length in enumerate(lengths):
        pages = -(-length // PAGE)
        items[row] = (row, 1, length - 1, at, pages, length, 0, 2)
        ids[at : at + pages] = rng.choice(SLOTS, pages, replace=False)
        starts[at : at + pages] = np.arange(pages) * PAGE
        at += pages


def test_values_come_with_refresh() -> None:
    pool = PagePool(*([torch.randn(SLOTS, 2, PAGE, 16)] for _ in range(2)), SLOTS)
    arrays = (np.zeros((ROWS, 8), np.int32), *(np.zeros(ROOM, np.int32) for _ in range(2)))
    standing = PageLists(*map(torch.from_numpy, arrays), complete=True, standing=True)
    backend, plain = TritonBackend(), TritonBackend()
    q = torch.randn(ROWS, 4, 16)
    for lengths in ([5, 33, 90], [6, 34, 91], [200, 1, 16]):
        fill(*arrays, lengths)
        assert backend.refresh(standing)
        got = backend.partial_lists(q, standing, pool, scale=0.25)
        once = PageLists(standing.items, standing.page_ids, standing.page_positions, complete=True)
        want = plain.partial_lists(q, once, pool, scale=0.25)
        torch.testing.assert_close(got.o, want.o, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.lse, want.lse, rtol=0, atol=1e-6)
    fill(*arrays, [1, 1, 1])
    stale = backend.partial_lists(q, standing, pool, scale=0.25)
    torch.testing.assert_close(stale.o, got.o, rtol=0, atol=0)

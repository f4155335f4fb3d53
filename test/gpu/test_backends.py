"""Attention backends of GPUs against one softmax over all keys."""

from __future__ import annotations

import random

import pytest
import torch

from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.choose import choose_device_backend
from sps_runtime.ops import reference
from sps_runtime.ops.kv_rows import decode, encode
from sps_runtime.types.errors import ConfigError

SLOTS, DIM = 64, 128
NAMES = ("flashinfer", "triton", "torch")


def backend_of(name: str, device: torch.device) -> AttentionBackend:
    try:
        return choose_device_backend(name, device, dtype=torch.bfloat16, head_dim=DIM)
    except (ConfigError, ImportError) as error:
        pytest.skip(str(error))


class Case:
    """Pages of one sequence in two pools, shuffled; what is not the sequence's is NaN."""

    def __init__(self, device: torch.device, seed: int, length: int, page: int, fp8: bool) -> None:
        self.rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.length, self.page, self.heads, self.kv_heads = length, page, 8, 2
        total = -(-length // page)
        self.ids = torch.tensor(self.rng.sample(range(2 * SLOTS), total), dtype=torch.int32)
        self.starts = torch.arange(total, dtype=torch.int32) * page
        shape = (2 * SLOTS, self.kv_heads, page, DIM)
        sides = []
        for _ in range(2):
            side = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            used = torch.randn(total, *shape[1:], generator=generator).bfloat16()
            used.transpose(1, 2).flatten(0, 1)[length:] = torch.nan  # behind the last token
            side[self.ids.long()] = used
            side = encode(side, "fp8_e4m3") if fp8 else side
            sides.append([part.to(device) for part in side.split(SLOTS)])
        self.pool = PagePool(*sides, SLOTS)
        self.q = torch.randn(length, self.heads, DIM, generator=generator).bfloat16().to(device)
        self.format = "fp8_e4m3" if fp8 else "native"

    def want(self, rows: slice, pages: list[int], head: int, window: int | None) -> Partial:
        """The reference of some rows' heads of one KV head over some pages."""
        group = self.heads // self.kv_heads
        sides = []
        for side in (self.pool.k, self.pool.v):
            there = reference.gather_pages(side, SLOTS, self.ids, self.length)
            sides.append(decode(there, self.format, torch.bfloat16)[:, head : head + 1])
        keys = [
            i for p in pages for i in range(p * self.page, min(self.length, (p + 1) * self.page))
        ]
        at = torch.tensor(keys, device=self.q.device).long()
        positions = torch.arange(self.length, device=self.q.device)[rows]
        q = self.q[rows, head * group : (head + 1) * group]
        return Partial(
            *reference.attention(
                q, *(side[at] for side in sides), positions, at, scale=DIM**-0.5, window=window
            )
        )


def close(got: Partial, rows: slice, heads: slice, want: Partial) -> None:
    torch.testing.assert_close(got.o[rows, heads].float(), want.o, rtol=0, atol=2e-2)
    torch.testing.assert_close(got.lse[rows, heads], want.lse, rtol=0, atol=2e-2)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, window: int | None, fp8: bool, device: torch.device) -> None:
    """A prompt's chunk, single tokens, and pages that are missing."""
    backend = backend_of(name, device)
    for seed, (length, page, start) in enumerate(
        [(700, 128, 0), (700, 64, 650), (1000, 128, 999), (300, 16, 100)]
    ):
        case = Case(device, seed, length, page, fp8)
        for share in (1.0, 0.6):
            pages = [p for p in range(len(case.ids)) if case.rng.random() < share]
            ids, starts = case.ids[pages], case.starts[pages]
            run = QueryRun(start, length - start, start, ids, starts, length)
            got = backend.partial(case.q, [run], case.pool, scale=DIM**-0.5, window=window)
            for head in range(case.kv_heads):
                rows, heads = slice(start, length), slice(head * 4, head * 4 + 4)
                close(got, rows, heads, case.want(rows, pages, head, window))
            assert (got.o[:start] == 0).all() and got.lse[:start].isneginf().all()


@pytest.mark.parametrize("name", NAMES)
def test_lists(name: str, device: torch.device) -> None:
    """Lists of their own for blocks and KV heads."""
    backend, case = backend_of(name, device), Case(device, 7, 1000, 128, False)
    items, chosen, want = [], [], []
    for row in range(0, 1000, 128):
        rows = min(128, 1000 - row)
        for head in range(case.kv_heads):
            pages = [p for p in range(row // 128) if case.rng.random() < 0.3] + [row // 128]
            items.append((row, rows, row, len(chosen), len(pages), 1000, head, 1))
            chosen += pages
            want.append((slice(row, row + rows), head, pages))
    table = torch.tensor(items, dtype=torch.int32)
    lists = PageLists(table, case.ids[chosen], case.starts[chosen], complete=True)
    got = backend.partial_lists(case.q, lists, case.pool, scale=DIM**-0.5)
    for rows, head, pages in want:
        close(got, rows, slice(head * 4, head * 4 + 4), case.want(rows, pages, head, None))


@pytest.mark.parametrize("name", NAMES)
def test_merge(name: str, device: torch.device) -> None:
    backend = backend_of(name, device)
    parts = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.bfloat16):
        o = torch.randn(33, 8, DIM, device=device).to(dtype)
        lse = 9 * torch.randn(33, 8, device=device)
        lse[:5], o[:5] = -torch.inf, 0
        parts.append(Partial(o, lse))
    parts[2].lse[:2] = 1.0
    out = torch.empty(33, 8, DIM, dtype=torch.bfloat16, device=device)
    backend.merge(parts, out)
    o, _ = reference.merge(torch.stack([p.o for p in parts]), torch.stack([p.lse for p in parts]))
    torch.testing.assert_close(out.float(), o.float(), rtol=0.02, atol=0.02)

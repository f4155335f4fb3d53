"""Queries behind the same pages, by FlashInfer's cascade as an emulator computes it, against one
softmax over all keys of each; inputs are new in every run, their seeds printed."""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field

import pytest
import torch
from test.kit.fake_flashinfer import FakeFlashInfer
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.flashinfer import backend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.flashinfer.shared import LEAST_BYTES, group_limit
from sps_runtime.attention.shared_prefix import ReadCost
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops import reference

DIM, SLOTS = 24, 96
CPU = torch.device("cpu")
Kinds = list[tuple[str, int]]


@dataclass
class Batch:
    """Single tokens, each with a list of page ids and a position; some begin alike.

    Attributes:
        lists: (page ids, position) of each query.
    """

    seed: int
    page: int
    heads: int = 6
    kv_heads: int = 2
    pools: int = 1
    dtype: torch.dtype = torch.float32
    lists: list[tuple[list[int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"seed {self.seed}")
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (SLOTS, self.kv_heads, self.page, DIM)
        sides = [[self.random(shape) for _ in range(self.pools)] for _ in range(2)]
        self.pool = PagePool(sides[0], sides[1], SLOTS)
        self.free = self.rng.sample(range(self.pools * SLOTS), self.pools * SLOTS)

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def pages(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count
        return taken

    def add(self, prefix: list[int], own: int, full: bool = False) -> None:
        """A query behind a prefix and pages of its own, the last of them full or not."""
        ids = prefix + self.pages(own)
        filled = self.page if full else self.rng.randint(1, self.page)
        self.lists.append((ids, (len(ids) - 1) * self.page + filled - 1))

    def shuffle(self) -> None:
        self.rng.shuffle(self.lists)

    def runs(self) -> list[QueryRun]:
        found = []
        for row, (ids, position) in enumerate(self.lists):
            starts = torch.arange(len(ids), dtype=torch.int32) * self.page
            run = (row, 1, position, torch.tensor(ids, dtype=torch.int32), starts, position + 1)
            found.append(QueryRun(*run))
        return found

    def standing(self, room: int) -> PageLists:
        empty = torch.zeros(room, dtype=torch.int32)
        items = torch.zeros(len(self.lists), 8, dtype=torch.int32)
        lists = PageLists(items, empty, empty.clone(), complete=True, standing=True)
        self.fill(lists)
        return lists

    def fill(self, lists: PageLists) -> None:
        at = 0
        for row, (ids, position) in enumerate(self.lists):
            n = len(ids)
            lists.page_ids[at : at + n] = torch.tensor(ids, dtype=torch.int32)
            lists.page_positions[at : at + n] = torch.arange(n, dtype=torch.int32) * self.page
            item = (row, 1, position, at, n, position + 1, 0, self.kv_heads)
            lists.items[row] = torch.tensor(item, dtype=torch.int32)
            at += n

    def want(self, q: Tensor, window: int | None) -> Partial:
        rows = []
        for row, (ids, position) in enumerate(self.lists):
            table = torch.tensor(ids, dtype=torch.int32)
            k, v = (
                reference.gather_pages(side, SLOTS, table, position + 1)
                for side in (self.pool.k, self.pool.v)
            )
            keys, at = torch.arange(position + 1), torch.tensor([position])
            found = reference.attention(q[row : row + 1], k, v, at, keys, scale=0.2, window=window)
            rows.append(found)
        return Partial(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def check(self, got: Partial, q: Tensor, window: int | None = None) -> None:
        want = self.want(q, window)
        close = {"rtol": 0, "atol": 2e-5 if self.dtype == torch.float32 else 3e-2}
        torch.testing.assert_close(got.o.float(), want.o.float(), **close)
        torch.testing.assert_close(got.lse, want.lse, **close)

    def queries(self) -> Tensor:
        return self.random((len(self.lists), self.heads, DIM))


@pytest.fixture
def pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing pays for any page: here pages are small beside the rows' second partials."""
    monkeypatch.setattr(backend, "read_cost", lambda _, least_bytes: ReadCost(1, 0, least_bytes))


def make(least: int = 0) -> tuple[FlashInferBackend, FakeFlashInfer]:
    library = FakeFlashInfer()
    return FlashInferBackend(library, TorchBackend(), CPU, least), library


def read_pages(library: FakeFlashInfer, since: int = 0) -> int:
    return sum(len(plan["indices"]) for plan in library.plans[since:])


def pages_of(batch: Batch) -> int:
    return sum(len(ids) for ids, _ in batch.lists)


def build(batch: Batch, name: str) -> int:
    """Fill a batch; how many pages are read when every page that can be shared is read once."""
    if name == "all":
        prefix = batch.pages(5)
        for _ in range(7):
            batch.add(prefix, 2)
        return 5 + 14
    if name == "one page":
        prefix = batch.pages(1)
        for own in (1, 3, 1):
            batch.add(prefix, own)
        return 1 + 5
    if name == "no suffix":
        prefix = batch.pages(4)
        for own in (0, 0, 3):
            batch.add(prefix, own, full=True)
        batch.add([], 2)
        return 4 + 3 + 2
    if name == "open page":  # the same last page, which they do not see whole
        prefix = batch.pages(3)
        batch.lists += [(prefix, 3 * batch.page - 2), (prefix, 3 * batch.page - 2)]
        return 2 + 1 + 1
    prefixes = batch.pages(6), batch.pages(3)
    for own in (1, 2, 1):
        batch.add(prefixes[0], own)
    for own in (1, 4):
        batch.add(prefixes[1], own)
    batch.add([], 3)
    batch.shuffle()
    return 6 + 4 + 3 + 5 + 3


@pytest.mark.usefixtures("pages_alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(6, 2), (5, 5), (8, 1)])
@pytest.mark.parametrize("page", [3, 16])
@pytest.mark.parametrize("name", ["all", "one page", "no suffix", "open page", "two groups"])
def test_shared_pages_are_read_once(
    name: str, page: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    batch = Batch(secrets.randbits(32), page, *heads, dtype=dtype)
    least = build(batch, name)
    backend, library = make()
    q = batch.queries()
    got = backend.partial(q, batch.runs(), batch.pool, scale=0.2)
    batch.check(got, q)
    assert read_pages(library) == least < pages_of(batch)


def test_it_must_pay() -> None:
    batch = Batch(secrets.randbits(32), 16)
    build(batch, "all")
    saved = (7 - 1) * 5 * 2 * 2 * 16 * DIM * 4 - 7 * 4 * 6 * (DIM * 4 + 4)
    q, runs = batch.queries(), batch.runs()
    for least, shares in ((saved, True), (saved + 1, False)):
        backend, library = make(least)
        batch.check(backend.partial(q, runs, batch.pool, scale=0.2), q)
        assert (read_pages(library) < pages_of(batch)) == shares
    assert LEAST_BYTES >= 16 << 20, "launches cost more than that"


@pytest.mark.usefixtures("pages_alone")
@pytest.mark.parametrize("window", [5, 40, 1000])
def test_windows_are_left_alone(window: int) -> None:
    batch = Batch(secrets.randbits(32), 16)
    build(batch, "two groups")
    backend, library = make()
    q = batch.queries()
    got = backend.partial(q, batch.runs(), batch.pool, scale=0.2, window=window)
    batch.check(got, q, window)
    assert all(plan["kind"] == "decode" for plan in library.plans)


@pytest.mark.usefixtures("pages_alone")
@pytest.mark.parametrize("pools", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefixes_over_several_pools(pools: int, dtype: torch.dtype) -> None:
    batch = Batch(secrets.randbits(32), 16, pools=pools, dtype=dtype)
    prefixes = batch.pages(9), batch.pages(4)
    for _ in range(5):
        batch.add(prefixes[0], batch.rng.randint(0, 3), full=True)
    for _ in range(3):
        batch.add(prefixes[1], batch.rng.randint(1, 3))
    batch.shuffle()
    backend, library = make()
    q = batch.queries()
    batch.check(backend.partial(q, batch.runs(), batch.pool, scale=0.2), q)
    assert read_pages(library) == pages_of(batch) - 4 * 9 - 2 * 4


@pytest.mark.usefixtures("pages_alone")
def test_beside_a_prompt() -> None:
    """A step of a chunk of a prompt and of single tokens, two of which share pages."""
    batch = Batch(secrets.randbits(32), 16)
    prefix = batch.pages(6)
    for own in (1, 2):
        batch.add(prefix, own)
    runs = batch.runs()
    ids = torch.tensor(batch.pages(3), dtype=torch.int32)
    runs.append(QueryRun(2, 20, 25, ids, torch.arange(3, dtype=torch.int32) * 16, 45))
    q = batch.random((22, batch.heads, DIM))
    backend, library = make()
    got = backend.partial(q, runs, batch.pool, scale=0.2)
    batch.check(Partial(got.o[:2], got.lse[:2]), q)
    k, v = (reference.gather_pages(side, SLOTS, ids, 45) for side in (batch.pool.k, batch.pool.v))
    o, lse = reference.attention(q[2:], k, v, torch.arange(25, 45), torch.arange(45), scale=0.2)
    torch.testing.assert_close(got.o[2:], o, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.lse[2:], lse, rtol=0, atol=2e-5)
    assert read_pages(library) == 6 + 3 + 3


@pytest.mark.usefixtures("pages_alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 3, 8, 17, 40])
def test_lists_that_stay(rows: int, dtype: torch.dtype) -> None:
    """Steps of as many rows with and without groups: two forms, whose wrappers and arrays on the
    device stay; what is replayed is what was recorded of the form."""
    seed = secrets.randbits(32)
    backend, library = make()
    forms: dict[str, set[int]] = {}
    lists = None
    for step in range(6):
        batch = Batch(seed, 4, 4, 2, dtype=dtype)  # the same pages
        batch.rng.seed(seed + step)
        shared = step % 3 != 1
        prefixes = [batch.pages(batch.rng.randint(2, 4)) for _ in range(3)]
        for row in range(rows):
            behind = shared and row < 4 * step + 2
            batch.add(prefixes[row // 2 % 3] if behind else [], 1)
        batch.shuffle()
        if lists is None:
            lists = batch.standing(400)
        else:
            batch.fill(lists)
            assert backend.refresh(lists)
        plans, runs = len(library.plans), len(library.runs)
        q = batch.queries()
        for _ in range(2):
            got = backend.partial_lists(q, lists, batch.pool, scale=0.2)
            batch.check(got, q)
        if step:
            assert len(library.plans) == plans, "planned when it should run"
        form = backend.form(lists)
        assert form == ("decode+shared" if shared else "decode")
        forms.setdefault(form, set(library.runs[runs:]))
        assert forms[form] == set(library.runs[runs:]), "another wrapper than was recorded"
    assert forms["decode"] < forms["decode+shared"]
    for plan in library.plans:
        if plan["kind"] == "prefill":
            assert len(plan["last_page_len"]) == group_limit(rows) + 1
            assert plan["qo_indptr"][-1] == rows and not plan["causal"]


@pytest.mark.usefixtures("pages_alone")
def test_more_heads_than_flashinfer_merges() -> None:
    batch = Batch(secrets.randbits(32), 4, 8192 // DIM + 1, 1, dtype=torch.bfloat16)
    build(batch, "all")
    backend, library = make()
    q = batch.queries()
    batch.check(backend.partial(q, batch.runs(), batch.pool, scale=0.2), q)
    assert library.merges == 0 and read_pages(library) < pages_of(batch)


@pytest.mark.usefixtures("pages_alone")
def test_arrays_of_a_form_stay() -> None:
    batch = Batch(secrets.randbits(32), 4)
    prefix = batch.pages(3)
    for _ in range(5):
        batch.add(prefix, 1)
    backend, _ = make()
    lists, q = batch.standing(64), batch.queries()
    backend.partial_lists(q, lists, batch.pool, scale=0.2)
    (step,) = backend._standing.values()
    shared = step.kept["shared"]
    before = [x.data_ptr() for x in (shared.rows, shared.back, shared.has)]
    batch.lists.reverse()
    batch.fill(lists)
    assert backend.refresh(lists)
    batch.check(backend.partial_lists(q, lists, batch.pool, scale=0.2), q)
    assert [x.data_ptr() for x in (shared.rows, shared.back, shared.has)] == before

"""Sparse attention's operators against those in torch, over poisoned pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test.triton.sparse_case import BLOCK, GROUP, HEADS, PAGE, SLOTS, make_case, sparse_settings
from torch import Tensor

from sps_runtime.ops.triton.choice import Limits, choose_pages
from sps_runtime.ops.triton.pools import PoolTables
from sps_runtime.ops.triton.scores import ScoredBlocks, page_shares
from sps_runtime.sparse.operators import Chosen
from sps_runtime.sparse.selection import SelectionSettings, narrow, select
from sps_runtime.sparse.torch_operators import TorchOperators
from sps_runtime.sparse.triton_operators import TritonSparseOperators
from sps_runtime.types.attention import SparseSettings

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
OPS, TRUTH = TritonSparseOperators(), TorchOperators()
FIELDS = ("items", "page_ids", "page_positions", "dropped", "dropped_ids")


def assert_same(got: Chosen, want: Chosen) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.read_pairs, got.causal_pairs) == (want.read_pairs, want.causal_pairs)


@DTYPES
@pytest.mark.parametrize(("head_dim", "page"), [(12, 16), (64, 16), (32, 48)])
def test_summaries_are_the_same_bytes(dtype: torch.dtype, head_dim: int, page: int) -> None:
    """But for means, whose sums may be rounded in another order; other slots keep what they had."""
    k, v = (torch.randn(5, 2, page, head_dim).to(dtype) for _ in range(2))
    k[1, 0, :, 3] = 0.7  # a channel of one value
    k[0], v[4] = torch.nan, torch.nan
    slots = torch.tensor([3, 1, 2], dtype=torch.int32)
    nbytes = OPS.summary_nbytes(page, head_dim, dtype.itemsize)
    got, want = (torch.full((5, 2, nbytes), 255, dtype=torch.uint8) for _ in range(2))
    OPS.summarise(k, v, slots, got)
    TRUTH.summarise(k, v, slots, want)
    means = 2 * head_dim * dtype.itemsize
    assert torch.equal(got[..., means:], want[..., means:])
    sums = [pool[[1, 2, 3], :, :means].contiguous().view(dtype) for pool in (got, want)]
    torch.testing.assert_close(*sums, rtol=2**-7, atol=1e-6)
    assert (got[[0, 4]] == 255).all()


@DTYPES
@pytest.mark.parametrize("rows", [0, 5, 8])
def test_shares(dtype: torch.dtype, rows: int) -> None:
    """Of blocks whole and cut short, of which the first has no page before it."""
    case = make_case(dtype, 32)
    settings = sparse_settings(rows=rows)
    tables = PoolTables()
    blocks = ScoredBlocks.of(
        case.queries.blocks, case.queries.page_ids, page_size=PAGE, block=BLOCK,
        rows=torch.full((len(case.queries.blocks),), rows), device=torch.device("cpu"),
    )  # fmt: skip
    summaries, k = tables.table(case.summaries.pools), tables.table(case.k)
    got = page_shares(case.q_THD, blocks, summaries, k, SLOTS, scale=case.scale)
    error = 1e-4 if dtype == torch.float32 else 1e-2
    for block, want_KN in enumerate(case.shares(settings)):
        shares = got[block * HEADS : (block + 1) * HEADS, : want_KN.shape[1]]
        torch.testing.assert_close(shares, want_KN, rtol=error, atol=1e-7)


def test_shares_do_not_depend_on_how_many_blocks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.float32, 16)
    settings = sparse_settings()
    want = case.choose(OPS, settings)
    monkeypatch.setattr("sps_runtime.ops.triton.scores.WORKSPACE_BYTES", 1)
    assert_same(case.choose(OPS, settings), want)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"tau": 0.3, "budget": 1.0}, torch.float32),
        ({"tau": 0.0, "budget": 1.0}, torch.bfloat16),
        ({"tau": 0.0, "end": 32, "end_rows": 20}, torch.float32),
        ({"estimator": "random"}, torch.bfloat16),
    ],
    ids=str,
)
def test_choice(change: dict[str, Any], dtype: torch.dtype) -> None:
    """One page in fifty may go either way where shares are rounded to half precision."""
    case, settings = make_case(dtype, 32), sparse_settings(**change)
    got, want = case.choose(OPS, settings), case.choose(TRUTH, settings)
    assert torch.equal(got.items[:, :3], want.items[:, :3])
    if dtype == torch.float32 or change:
        assert_same(got, want)
    read = [_pages(chosen) for chosen in (got, want)]
    assert len(read[0] ^ read[1]) <= 0.02 * len(read[1])


def _pages(chosen: Chosen) -> set[tuple[int, int]]:
    """(item, page) of all that is read."""
    ids = chosen.page_ids.tolist()
    return {
        (item, page)
        for item, row in enumerate(chosen.items.tolist())
        for page in ids[row[3] : row[3] + row[4]]
    }


def random_shares(blocks: int, pages: list[int]) -> list[Tensor]:
    """With many equal ones, whose sums fp32 holds without rounding."""
    return [torch.randint(0, 12, (HEADS, pages[b])).float() / 64 for b in range(blocks)]


@pytest.mark.parametrize(
    "settings",
    [
        SelectionSettings(tau=0.1, budget=0.3, minimum=3),
        SelectionSettings(tau=0.5, budget=1.0, minimum=0, sink=0, window=0),
        SelectionSettings(tau=0.0, budget=0.25, minimum=30, sink=2, window=5),
        SelectionSettings(tau=0.25, budget=1.0, minimum=12, sink=40, window=0),
    ],
    ids=["both", "tau", "minimum", "sinks"],
)
@pytest.mark.parametrize("superblocks", [False, True])
def test_selection_of_given_shares(settings: SelectionSettings, superblocks: bool) -> None:
    """Page for page, ties too; blocks of two superblocks, the first of which begins a prompt."""
    starts = [0, BLOCK, 320, 320 + BLOCK]
    kv_len, pages = 320 + 2 * BLOCK - 5, [at // PAGE for at in starts]
    shares = random_shares(4, pages)
    width = 32
    padded = torch.full((4 * HEADS, width), torch.nan)
    for block, share in enumerate(shares):
        padded[block * HEADS : (block + 1) * HEADS, : pages[block]] = share
    rows = [BLOCK, BLOCK, BLOCK, BLOCK - 5]
    table = [(32 * i, rows[i], starts[i], i // 2, 0, kv_len) for i in range(4)]
    blocks, ids = torch.tensor(table, dtype=torch.int32), torch.randperm(24).int()
    own = BLOCK // PAGE
    fields = ("tau", "budget", "minimum", "sink", "window")
    limits = Limits(*(getattr(settings, name) for name in fields), own, superblocks)
    got = choose_pages(padded, blocks, ids, limits, page_size=PAGE, kv_heads=HEADS)
    if superblocks:
        shares = narrow(shares[:2], 0, settings) + narrow(shares[2:], pages[2], settings)
    for item, row in enumerate(got.items.tolist()):
        block, head = divmod(item, HEADS)
        kept = select(shares[block][head : head + 1], own, settings)[0]
        stop = -(-(starts[block] + rows[block]) // PAGE)
        want = torch.cat((kept.nonzero()[:, 0], torch.arange(pages[block], stop)))
        entries = slice(row[3], row[3] + row[4])
        assert torch.equal(got.page_positions[entries], (want * PAGE).int())
        assert torch.equal(got.page_ids[entries], ids[want])
        begin, count = got.dropped[item].tolist()
        assert torch.equal(got.dropped_ids[begin : begin + count], ids[: pages[block]][~kept])


def test_a_superblock_of_one_token_reads_everything() -> None:
    case = make_case(torch.float32, 16, lengths=((193, 1),))
    settings = sparse_settings(budget=0.1, minimum=2)
    got = case.choose(OPS, settings)
    assert_same(got, case.choose(TRUTH, settings))
    assert len(got.dropped_ids) == 0


def test_no_blocks() -> None:
    case = make_case(torch.float32, 16, lengths=())
    chosen = case.choose(OPS, sparse_settings())
    assert len(chosen.items) == chosen.read_pairs == chosen.causal_pairs == 0
    o, lse = OPS.tail(case.q_THD, case.queries, chosen, case.summaries, case.scale)
    assert o.shape == (0, HEADS * GROUP, 16) and lse.shape == (0, HEADS * GROUP)


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 18])
def test_masses(dtype: torch.dtype, count: int) -> None:
    case = make_case(dtype, 32)
    settings: SparseSettings = sparse_settings()
    full = torch.cat((case.queries.page_ids[:7], case.queries.page_ids[8:]))
    ids = full[:count]  # page 7 is not full and has no summary
    arguments = (case.q_THD[7], ids, case.k, case.summaries, settings, case.scale)
    got = OPS.masses(*arguments)
    assert got.shape == (HEADS * GROUP, count)
    if count:
        error = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, TRUTH.masses(*arguments), rtol=0, atol=error)


@DTYPES
@pytest.mark.parametrize("head_dim", [12, 32])
def test_tail(dtype: torch.dtype, head_dim: int) -> None:
    case = make_case(dtype, head_dim)
    chosen = case.choose(TRUTH, sparse_settings())
    arguments = (case.q_THD, case.queries, chosen, case.summaries, case.scale)
    (o, lse), (want_o, want_lse) = OPS.tail(*arguments), TRUTH.tail(*arguments)
    assert torch.equal(lse.isneginf(), want_lse.isneginf()) and lse.isneginf().any()
    error = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(o, want_o, rtol=0, atol=error)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    kept = torch.randn(o.shape), torch.randn(lse.shape)
    kept[0][3], kept[1][3] = 0.0, -torch.inf
    kept[0][-1], kept[1][-1] = torch.nan, -torch.inf  # what saw nothing may never have been written
    onto = kept[0].clone(), kept[1].clone()
    assert all(a is b for a, b in zip(OPS.tail(*arguments, onto), onto, strict=True))
    kept[0][-1] = 0.0
    for got, want in zip(onto, TRUTH.tail(*arguments, kept), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=error)


def test_a_pool_that_cannot_be_read_has_no_slots() -> None:
    case = make_case(torch.float32, 16)
    want = case.choose(OPS, sparse_settings())
    case.k.append(case.k[0][:0])
    pools = case.summaries.pools
    assert isinstance(pools, list)
    pools.append(pools[0][:0])
    assert_same(case.choose(OPS, sparse_settings()), want)


def test_other_estimators_go_to_torch() -> None:
    case, settings = make_case(torch.float32, 16), sparse_settings(estimator="quest")
    assert_same(case.choose(OPS, settings), case.choose(TRUTH, settings))

"""The kernels' sparse operators against those in torch, over the same pages and summaries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test.kit.block_case import BlockCase

from sps_runtime.sparse.kernel_operators import KernelSparseOperators
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.selection import select
from sps_runtime.sparse.torch_operators import TorchOperators, gather, selection_settings
from sps_runtime.types.attention import SparseSettings

kernels = pytest.importorskip("sps_kernel")
PAGE, HEADS, GROUP, SLOTS = 16, 2, 3, 64
SETTINGS = SparseSettings(budget=0.3, minimum=4, rows=16, superblock=256)


def make_case(
    dtype: torch.dtype, head_dim: int, *, exact: bool = False, superblock: int = 256
) -> BlockCase:
    """Two sequences: one whole, one whose last half is new. With `exact`, keys and rows that
    sketches and bytes hold without rounding."""
    blocks, ids, row, number = [], [], 0, 0
    free = torch.randperm(2 * SLOTS).tolist()
    for total, new in ((600, 600), (1024, 512)):
        begin = len(ids)
        ids += [free.pop() for _ in range(-(-total // PAGE))]
        for at in range(total - new, total, 64):
            tokens = min(64, total - at)
            blocks.append((row, tokens, at, number + at // superblock, begin, total))
            row += tokens
        number += 100
    shape = (SLOTS, HEADS, PAGE, head_dim)
    k = [torch.randn(shape) * (torch.rand(SLOTS, HEADS, 1, head_dim) + 0.3) for _ in range(2)]
    q = torch.randn(row, HEADS * GROUP, head_dim) * 2
    if exact:
        k = [torch.randint(0, 4, shape).float() for _ in range(2)]
        for pool in k:
            pool[:, :, 0], pool[:, :, 1] = 0, 3
        q = q.sign() * 1.5
    k = [pool.to(dtype) for pool in k]
    v = [torch.randn(shape).to(dtype) for _ in range(2)]
    operators = TorchOperators()
    nbytes = operators.summary_nbytes(PAGE, head_dim, dtype.itemsize)
    pools = [torch.zeros(SLOTS, HEADS, nbytes, dtype=torch.uint8) for _ in range(2)]
    for k_pool, v_pool, out in zip(k, v, pools, strict=True):
        operators.summarise(k_pool, v_pool, torch.arange(SLOTS, dtype=torch.int32), out)
    queries = QueryBlocks(
        torch.tensor(blocks, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32), 0
    )
    summaries = SummaryPool(pools, SLOTS, PAGE, head_dim)
    return BlockCase(q.to(dtype), k, v, queries, summaries, head_dim**-0.5, block=64)


@pytest.fixture
def operators() -> KernelSparseOperators:
    return KernelSparseOperators(kernels)


def lists(chosen: Chosen) -> list[set[int]]:
    """The pages that each item reads."""
    items, ids = chosen.items.tolist(), chosen.page_ids.tolist()
    return [set(ids[item[3] : item[3] + item[4]]) for item in items]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@DTYPES
@pytest.mark.parametrize("head_dim", [12, 16, 64, 128])
def test_summaries_are_the_same_bytes(operators, dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    case = make_case(dtype, head_dim)
    out = torch.zeros_like(case.summaries.pools[0])
    operators.summarise(case.k[0], case.v[0], torch.arange(SLOTS, dtype=torch.int32), out)
    nbytes = operators.summary_nbytes(PAGE, head_dim, dtype.itemsize)
    assert out.shape[2] == nbytes
    means = 2 * head_dim * dtype.itemsize
    assert torch.equal(out[..., means:], case.summaries.pools[0][..., means:])
    got, want = (
        pool[..., :means].contiguous().view(dtype) for pool in (out, case.summaries.pools[0])
    )
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("head_dim", [12, 32, 64])
def test_all_pages_without_a_bound(operators, dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(1)
    case = make_case(dtype, head_dim)
    settings = replace_settings(tau=0.0, budget=1.0)
    assert_same(case.choose(operators, settings), case.choose(TorchOperators(), settings))


def replace_settings(**changes: float) -> SparseSettings:
    fields = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}
    return SparseSettings(**fields | changes)


def assert_same(got: Chosen, want: Chosen) -> None:
    for name in ("items", "page_ids", "page_positions", "dropped", "dropped_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.read_pairs, got.causal_pairs) == (want.read_pairs, want.causal_pairs)


def regret(
    case: BlockCase, settings: SparseSettings, got: list[set[int]], want: list[set[int]]
) -> float:
    """How much less share, in logs, the worst page has that only `got` has than the best that it
    lacks; the most of all items."""
    worst = 0.0
    blocks = case.queries.blocks.tolist()
    for item, share_KN in enumerate(row for shares in case.shares(settings) for row in shares):
        entry = blocks[item // HEADS][4]
        place = {
            int(page): j for j, page in enumerate(case.queries.page_ids[entry:][: len(share_KN)])
        }
        lacks = [float(share_KN[place[page]]) for page in want[item] - got[item]]
        has = [float(share_KN[place[page]]) for page in got[item] - want[item]]
        if lacks and has:
            worst = max(worst, math.log(max(lacks) / min(has)))
    return worst


@DTYPES
@pytest.mark.parametrize(
    "change", [{}, {"rows": 4}, {"rows": 0}, {"tau": 0.3, "budget": 1.0}], ids=str
)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_choice_is_that_of_torch(operators, dtype, change, exact) -> None:
    """Pages that only one of the two reads have nearly equal shares: within what exponentials are
    off by where bytes hold all, within what rounding to bytes does elsewhere."""
    torch.manual_seed(2)
    case = make_case(dtype, 64, exact=exact, superblock=64)
    settings = replace_settings(superblock=64, wide_from=1 << 20, **change)
    got = lists(case.choose(operators, settings))
    want = lists(case.choose(TorchOperators(), settings))
    if "tau" not in change:
        assert [len(pages) for pages in got] == [len(pages) for pages in want]
    assert regret(case, settings, got, want) <= (0.015 if exact else 0.25)
    differing = sum(len(a ^ b) for a, b in zip(got, want, strict=True))
    assert differing <= (0.02 if exact else 0.1) * sum(map(len, want)), differing


@DTYPES
def test_superblocks_choose_from_one_set(operators, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    case = make_case(dtype, 64, exact=True)
    got, want = (lists(case.choose(each, SETTINGS)) for each in (operators, TorchOperators()))
    differing = sum(len(a ^ b) for a, b in zip(got, want, strict=True))
    assert differing <= 0.03 * sum(map(len, want)), differing
    union = [set[int]() for _ in range(HEADS)]
    for item, pages in enumerate(got[: HEADS * 4]):
        union[item % HEADS] |= pages
    assert all(len(pages) <= 16 for pages in union)


@DTYPES
@pytest.mark.parametrize("head_dim", [12, 32, 64])
def test_tail(operators, dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(4)
    case = make_case(dtype, head_dim)
    chosen = case.choose(TorchOperators(), SETTINGS)
    arguments = (case.q_THD, case.queries, chosen, case.summaries, case.scale)
    (o, lse), (want_o, want_lse) = operators.tail(*arguments), TorchOperators().tail(*arguments)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(o, want_o, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    kept = torch.randn(o.shape), torch.randn(lse.shape)
    onto = kept[0].clone(), kept[1].clone()
    assert all(a is b for a, b in zip(operators.tail(*arguments, onto), onto, strict=True))
    for got, want in zip(onto, TorchOperators().tail(*arguments, kept), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=tolerance)


def test_other_estimators_go_to_torch(operators) -> None:
    torch.manual_seed(5)
    case = make_case(torch.float32, 64)
    settings = replace_settings(estimator="quest")
    assert_same(case.choose(operators, settings), case.choose(TorchOperators(), settings))


def test_a_pool_that_cannot_be_read_has_no_slots(operators) -> None:
    torch.manual_seed(6)
    case = make_case(torch.float32, 32)
    pools = [*case.summaries.pools, case.summaries.pools[0][:0]]
    wider = replace(
        case, k=[*case.k, case.k[0][:0]], summaries=replace(case.summaries, pools=pools)
    )
    assert_same(wider.choose(operators, SETTINGS), case.choose(operators, SETTINGS))


@DTYPES
def test_last_rows_alone(operators, dtype: torch.dtype) -> None:
    """What a generated token reads: nearly what `masses` and `select` come to, and nobody else's
    rows matter."""
    torch.manual_seed(5)
    case = make_case(dtype, 64, superblock=64)
    blocks, ids = case.queries.blocks.tolist(), case.queries.page_ids
    rest = torch.ones(len(case.q_THD), dtype=torch.bool)
    rest[[row + rows - 1 for row, rows, *_ in blocks]] = False
    case.q_THD[rest] = torch.nan
    found = operators.choose_for_last_rows(
        case.q_THD, case.queries, case.k, case.summaries, SETTINGS, case.scale
    )
    differing = total = 0
    for number, (row, rows, position, _, entry, _) in enumerate(blocks):
        before = position // PAGE
        q_HD = case.q_THD[row + rows - 1]
        mass = TorchOperators().masses(
            q_HD, ids[entry : entry + before], case.k, case.summaries, SETTINGS, case.scale
        )
        own = ids[entry + before : entry + -(-(position + rows) // PAGE)]
        keys = gather(case.k, SLOTS, own).float().transpose(0, 1).flatten(1, 2)[:, :rows]
        group = q_HD.float().unflatten(0, (HEADS, -1)) * case.scale
        lse = (group @ keys.transpose(1, 2)).logsumexp(-1).flatten()
        share = (mass - torch.logaddexp(lse, mass.logsumexp(-1))[:, None]).exp()
        setting = selection_settings(SETTINGS, position, PAGE, 1)
        kept = select(share.unflatten(0, (HEADS, -1)).norm(dim=1), 64 // PAGE, setting)
        for head in range(HEADS):
            begin, count = found.items[number * HEADS + head, 3:5].tolist()
            got = set(found.page_ids[begin : begin + count].tolist())
            want = {*ids[entry : entry + before][kept[head]].tolist(), *own.tolist()}
            assert len(got) == len(want)
            differing, total = differing + len(got ^ want), total + len(want)
    assert differing <= 0.1 * total, (differing, total)

"""Every estimator that a request can name, through the operators, over pages of a pool."""

from __future__ import annotations

import pytest
import torch

from sps_runtime.config.attention import ESTIMATORS
from sps_runtime.sparse.estimators import registry
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.torch_operators import TorchOperators
from sps_runtime.types.attention import SparseSettings

PAGE, HEADS, GROUP, DIM, PAGES = 64, 2, 2, 32, 40
SUPERBLOCK = 512
SCALE = DIM**-0.5


def pool(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, PAGES, HEADS, PAGE, DIM, generator=generator).unbind()


def chosen(name: str, k: torch.Tensor, q_THD: torch.Tensor, start: int, budget: float) -> Chosen:
    """What the rows at `start`, one superblock, read of pages that lie in reverse order."""
    operators = TorchOperators()
    out = torch.zeros(PAGES, HEADS, operators.summary_nbytes(PAGE, DIM, 4), dtype=torch.uint8)
    operators.summarise(k, k, torch.arange(PAGES, dtype=torch.int32), out)
    ids = torch.arange(PAGES - 1, -1, -1, dtype=torch.int32)
    rows = range(0, len(q_THD), PAGE)
    end = start + len(q_THD)
    blocks = [(row, min(PAGE, len(q_THD) - row), start + row, 0, 0, end) for row in rows]
    queries = QueryBlocks(torch.tensor(blocks, dtype=torch.int32), ids, 1)
    settings = SparseSettings(
        estimator=name, tau=0.0, budget=budget, minimum=4, superblock=SUPERBLOCK
    )
    summaries = SummaryPool([out], PAGES, PAGE, DIM)
    return operators.choose(q_THD, queries, [k], summaries, settings, SCALE)


def pages_of(found: Chosen, item: int) -> set[int]:
    begin, count = found.items[item, 3:5].tolist()
    return {int(at) // PAGE for at in found.page_positions[begin : begin + count]}


def test_all_names_of_requests_are_known() -> None:
    """`stride` is a strategy of its own and judges no pages."""
    assert set(ESTIMATORS.values()) - {"stride"} == set(registry.ESTIMATORS)


@pytest.mark.parametrize("name", sorted(registry.ESTIMATORS))
def test_reads_what_its_budget_allows_and_its_own_page(name: str) -> None:
    k, _ = pool(1)
    start = 3 * SUPERBLOCK
    q = torch.randn(7 * PAGE + 20, HEADS * GROUP, DIM)
    found = chosen(name, k, q, start, 0.25)
    for item in range(len(found.items)):
        block = item // HEADS
        read, before = pages_of(found, item), start // PAGE + block
        assert {0, before, before - 1, before - 2} <= read
        assert len(read) <= -(-0.25 * (before + 1) // 1)
    assert found.read_pairs == len(found.page_ids)


@pytest.mark.parametrize("name", sorted({*registry.ESTIMATORS} - {"null", "random"}))
def test_finds_a_page_that_every_row_wants(name: str) -> None:
    """All keys of one page lie along the queries, on which all estimators must agree."""
    k, _ = pool(2)
    want = torch.randn(DIM, generator=torch.Generator().manual_seed(3))
    k[PAGES - 1 - 11] = want * 3
    start = 3 * SUPERBLOCK
    found = chosen(name, k, want.expand(SUPERBLOCK, HEADS * GROUP, DIM), start, 0.3)
    assert all(11 in pages_of(found, item) for item in range(len(found.items)))


def test_forced_page_sets_are_the_budgets_and_nobodys_choice() -> None:
    k, _ = pool(4)
    start = 3 * SUPERBLOCK
    q = torch.randn(7 * PAGE, HEADS * GROUP, DIM)
    first, other = (chosen("random", k, rows, start, 0.25) for rows in (q, -q))
    for item in range(len(first.items)):
        pages = start // PAGE + item // HEADS + 1
        assert len(pages_of(first, item)) == max(4, -(-pages // 4))
        assert pages_of(first, item) == pages_of(other, item)


def test_null_reads_the_sink_and_the_latest_pages() -> None:
    k, _ = pool(4)
    start = 3 * SUPERBLOCK
    found = chosen("null", k, torch.randn(PAGE, HEADS * GROUP, DIM), start, 0.25)
    before = start // PAGE
    assert pages_of(found, 0) == {0, *range(before - 5, before + 1)}


def test_vertical_slash_follows_the_last_block() -> None:
    """What only the superblock's last block wants is read by all of its blocks."""
    k, _ = pool(5)
    want = torch.randn(DIM, generator=torch.Generator().manual_seed(6))
    k[PAGES - 1 - 9] = want
    q = torch.randn(SUPERBLOCK, HEADS * GROUP, DIM)
    q[-PAGE:] = want
    found = chosen("vertical_slash", k, q, 3 * SUPERBLOCK, 0.3)
    assert all(9 in pages_of(found, item) for item in range(len(found.items)))

"""What crosses is what the formulas say, to the byte (docs/design.md), summed over ranks."""

from __future__ import annotations

import pytest
from test.dist.step_case import LAYERS, StepCase

from sps_runtime.distributed.communicator import Traffic

PAGE, DIM, B = 16, 16, 4  # fp32


def totals(case: StepCase) -> tuple[float, float]:
    """(logical, physical) attention bytes of all ranks, per layer."""
    traffic: list[Traffic] = case.run()
    logical = sum(t.attention_bytes for t in traffic)
    return logical / LAYERS, sum(t.physical_bytes for t in traffic) / LAYERS


def fresh(strategy: str, sp: int, lay: str = "zigzag", **more: object) -> StepCase:
    """One fresh prompt over all ranks in equal shares of whole pages."""
    length = 2 * sp * PAGE
    return StepCase([(0, length)], strategy=strategy, sp=sp, page=PAGE, lay=lay, **more)


@pytest.mark.parametrize("sp", [2, 3, 4])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(("lay", "trimmed"), [("zigzag", 3 / 4), ("contiguous", 1 / 2)])
def test_pass_kv_ships_nothing_that_a_causal_mask_discards(
    sp: int, copy: bool, lay: str, trimmed: float
) -> None:
    hosts = tuple(range(sp)) if copy else None
    case = fresh("pass_kv", sp, lay, heads=6, kv_heads=3, hosts=hosts)
    length = case.sequences[0][1]
    logical, physical = totals(case)
    assert logical == trimmed * length * (sp - 1) * 2 * 3 * DIM * B
    assert physical == (logical if copy else 0)


@pytest.mark.parametrize(("kv_format", "row"), [("int8", DIM + 4), ("fp8_e4m3", DIM)])
def test_quantised_pages_travel_as_they_lie(kv_format: str, row: int) -> None:
    case = fresh("pass_kv", 2, heads=6, kv_heads=3, hosts=(0, 1), kv_format=kv_format)
    logical, physical = totals(case)
    assert logical == physical == 3 / 4 * case.sequences[0][1] * 2 * 3 * row


@pytest.mark.parametrize("sp", [2, 3, 4])
def test_pass_q_contiguous(sp: int) -> None:
    case = fresh("pass_q", sp, "contiguous", heads=6, kv_heads=3)
    length = case.sequences[0][1]
    logical, physical = totals(case)
    assert logical == physical == length * (sp - 1) / 2 * 6 * (2 * DIM * B + 4)


@pytest.mark.parametrize("sp", [2, 3, 4])
@pytest.mark.parametrize("length", [95, 96 * 16])
def test_sp_decode_costs_the_same_whatever_the_context(sp: int, length: int) -> None:
    case = StepCase([(length, 1)], strategy="pass_q", sp=sp, page=PAGE, lay="contiguous", heads=6)
    logical, _ = totals(case)
    assert logical == (sp - 1) * 6 * (2 * DIM * B + 4)


@pytest.mark.parametrize("sp", [2, 3, 4])
def test_replicated_decode(sp: int) -> None:
    case = StepCase(
        [(95, 1), (95, 1)], strategy="pass_q", placement="replicated", sp=sp, page=PAGE,
        lay="contiguous", heads=12, kv_heads=2,
    )  # fmt: skip
    logical, _ = totals(case)
    assert logical == 2 * 12 * (DIM * B + 4) * (sp - 1)


@pytest.mark.parametrize(("sp", "kv_heads"), [(2, 4), (4, 4), (4, 2), (3, 1), (3, 3), (4, 1)])
@pytest.mark.parametrize("copy", [False, True])
def test_ulysses(sp: int, kv_heads: int, copy: bool) -> None:
    hosts = tuple(range(sp)) if copy else None
    case = fresh("ulysses", sp, heads=12, kv_heads=kv_heads, hosts=hosts)
    length = case.sequences[0][1]
    logical, physical = totals(case)
    queries = length * 2 * 12 * DIM * B * (sp - 1) / sp
    keys = length * 2 * max(kv_heads, sp) * DIM * B * (sp - 1) / sp
    assert logical == queries + keys
    assert physical == (logical if copy else queries)


@pytest.mark.parametrize("copy", [False, True])
def test_cut_last_pages_are_sent_cut(copy: bool) -> None:
    hosts = (0, 1) if copy else None
    case = StepCase(
        [(0, 2 * PAGE + 5)], strategy="ulysses", sp=2, page=PAGE, heads=2, kv_heads=2, hosts=hosts,
        lay="contiguous",
    )  # fmt: skip
    # Three pages: two on rank 0, the cut one on rank 1; a head each.
    queries = 2 * (2 * PAGE + 5) * DIM * B
    keys = (2 * PAGE + 5) * 2 * DIM * B
    assert totals(case)[0] == queries + keys


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
def test_sequences_wholly_on_one_rank_send_nothing(strategy: str) -> None:
    case = StepCase([(0, 40), (70, 9), (80, 1)], strategy=strategy, sp=3, page=PAGE, lay="one")
    assert totals(case) == (0, 0)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_a_window_keeps_far_pages_where_they_are(strategy: str) -> None:
    """Ten pages on rank 0, then two new ones on rank 1: only the windowed layer's last page crosses
    (it reads one page of rank 0), the other layer's ten do."""
    window = PAGE
    pages = 10 * PAGE
    case = StepCase(
        [(pages, 2 * PAGE)], strategy=strategy, sp=2, page=PAGE, window=window, lay="two-blocks"
    )
    logical = totals(case)[0] * LAYERS
    if strategy == "pass_kv":
        assert logical == (PAGE + pages) * 2 * 2 * DIM * B
    else:  # the first new token sees window - 1 old keys, the last one that sees any: window - 1
        assert logical == (window - 1 + 2 * PAGE) * 4 * (2 * DIM * B + 4)

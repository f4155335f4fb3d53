"""Fetch or route: plans cover, are never dearer than the plain ones, and close to the cheapest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sps_runtime.sparse.cover import Cover, greedy_cover, minimum_cover

FACTOR = 1.5  # of the greedy's cost over the cheapest, on random graphs


@st.composite
def demands(draw: st.DrawFn, most: int = 12) -> tuple[Tensor, float, float]:
    blocks, pages = draw(st.integers(1, most)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    rows = torch.rand(blocks, 1, generator=generator)
    columns = torch.rand(1, pages, generator=generator)
    density = draw(st.floats(0.02, 1.0))
    wanted = torch.rand(blocks, pages, generator=generator) < density * (rows + columns)
    return wanted, 1.0, draw(st.sampled_from([0.5, 1.0, 1.97, 4.06, 8.0]))


def covers(plan: Cover, wanted: Tensor, page: float, block: float) -> bool:
    paid = float(plan.fetched_N.sum()) * page + float(plan.routed_Q.sum()) * block
    served = plan.fetched_N[None] | plan.routed_Q[:, None]
    return bool((served | ~wanted).all()) and abs(paid - plan.cost) < 1e-6


@settings(max_examples=150, deadline=None)
@given(demands())
def test_the_greedy_is_never_dearer_than_fetching_or_routing_all(
    case: tuple[Tensor, float, float],
) -> None:
    wanted, page, block = case
    plan = greedy_cover(wanted, page, block)
    assert covers(plan, wanted, page, block)
    fetch_all = float(wanted.any(0).sum()) * page
    route_all = float(wanted.any(1).sum()) * block
    assert plan.cost <= min(fetch_all, route_all) + 1e-6


@settings(max_examples=150, deadline=None)
@given(demands())
def test_the_greedy_is_close_to_the_cheapest(case: tuple[Tensor, float, float]) -> None:
    wanted, page, block = case
    best = minimum_cover(wanted, page, block)
    assert covers(best, wanted, page, block)
    assert best.cost - 1e-6 <= greedy_cover(wanted, page, block).cost <= FACTOR * best.cost + 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_on_larger_graphs_too(seed: int) -> None:
    """What a rank wants of another in a prefill of some thousand tokens: blocks that share a
    superblock's pages, and pages of their own."""
    generator = torch.Generator().manual_seed(seed)
    blocks, pages, wide = 32, 64, 8
    common = torch.rand(blocks // wide, pages, generator=generator) < 0.2
    wanted = common.repeat_interleave(wide, 0)
    wanted &= torch.rand(blocks, pages, generator=generator) < 0.5
    wanted |= torch.rand(blocks, pages, generator=generator) < 0.1 * (seed % 3)
    wanted[int(torch.randint(blocks, (), generator=generator))] = True
    for block in (0.5, 1.97, 4.06, 8.0):
        best, plan = minimum_cover(wanted, 1.0, block), greedy_cover(wanted, 1.0, block)
        assert covers(plan, wanted, 1.0, block) and covers(best, wanted, 1.0, block)
        plain = min(float(wanted.any(0).sum()), float(wanted.any(1).sum()) * block)
        assert best.cost - 1e-6 <= plan.cost <= min(plain, FACTOR * best.cost) + 1e-6


@settings(max_examples=40, deadline=None)
@given(demands(most=7))
def test_the_minimum_cut_is_the_cheapest_of_all(case: tuple[Tensor, float, float]) -> None:
    wanted, page, block = case
    costs = []
    for chosen in itertools.product((False, True), repeat=len(wanted)):
        routed = torch.tensor(chosen)
        fetched = wanted[~routed].any(0)
        costs.append(float(fetched.sum()) * page + float(routed.sum()) * block)
    assert minimum_cover(wanted, page, block).cost == pytest.approx(min(costs))


def test_on_the_complete_graph_it_is_the_choice_of_pass_kv_or_pass_q() -> None:
    everything = torch.ones(5, 12, dtype=torch.bool)
    assert int(greedy_cover(everything, 1.0, 4.0).fetched_N.sum()) == 12
    assert int(greedy_cover(everything, 1.0, 2.0).routed_Q.sum()) == 5


def test_one_block_that_wants_everything_is_routed() -> None:
    wanted = torch.zeros(6, 20, dtype=torch.bool)
    wanted[:, 3] = True
    wanted[4] = True
    plan = greedy_cover(wanted, 1.0, 4.0)
    assert plan.routed_Q.nonzero()[:, 0].tolist() == [4]
    assert plan.fetched_N.nonzero()[:, 0].tolist() == [3]


def test_nothing_wanted_costs_nothing() -> None:
    plan = greedy_cover(torch.zeros(3, 4, dtype=torch.bool), 1.0, 2.0)
    assert plan.cost == 0 and not plan.fetched_N.any() and not plan.routed_Q.any()

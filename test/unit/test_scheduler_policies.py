"""Who runs, on which ranks, and in whose turn."""

from __future__ import annotations

import itertools

import pytest
from test.kit.echo_server import AnyDegree, EchoServer

from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.scheduler.policies.view import View
from sps_runtime.types.plan import StepPlan


class FixedGroup(AnyDegree):
    """Prefills each request on the ranks that its first token names: 10 + mask."""

    def __init__(self) -> None: ...

    def _group(self, view: View, run, load) -> int:
        return run.sequence.tokens[0] - 10 | view.required(run)


def grouped(**options: object) -> EchoServer:
    server = EchoServer(**options)
    server.scheduler._policy = FixedGroup()
    return server


def plans_of(server: EchoServer, phase: str) -> list[StepPlan]:
    return [plan for plan in server.plans if plan.phase == phase]


def test_a_lone_long_prompt_is_spread_over_all_ranks() -> None:
    server = EchoServer(sp=4, pages=64, chunked_prefill_size=64)
    server.add([*range(4, 44)] * 5, 3)
    server.run()
    assert [plan.group for plan in plans_of(server, "prefill")] == [(0, 1, 2, 3)]
    owners = {page // 64 for page in memory_pages(server.plans[0])}
    assert owners == {0, 1, 2, 3}


def memory_pages(plan: StepPlan) -> list[int]:
    return memoryview(plan.sequences[0].pages).cast("i").tolist()


def test_a_prompt_of_few_pages_takes_few_ranks() -> None:
    server = EchoServer(sp=4, page_size=64)
    server.add([*range(4, 44)] * 2, 3)
    server.run()
    assert {len(plan.group) for plan in server.plans} == {2}


def test_short_prompts_are_packed_on_single_ranks() -> None:
    server = EchoServer(sp=2, pages=64)
    for first in range(8):
        server.add([first + 4, 30, 31], 2)
    server.run()
    prefills = plans_of(server, "prefill")
    assert {plan.group for plan in prefills} == {(0,), (1,)}
    assert max(len(plan.sequences) for plan in prefills) > 1


def test_long_prompts_of_a_group_go_one_after_the_other() -> None:
    server = EchoServer(sp=1, pages=400, chunked_prefill_size=8)
    long = [server.add([4 + k, *range(4, 40)], 1) for k in range(3)]
    short = server.add([9, 9, 9], 1)
    server.run()
    order = [news.rid for news in server.news if news.finish is not None]
    assert order == [short, *long]


def test_a_packed_step_is_one_chunk_while_requests_decode() -> None:
    server = EchoServer(sp=1, pages=400, chunked_prefill_size=8)
    server.add([4, 5, 6], 60, ignore_eos=True)
    for _ in range(8):
        server.turn()
    for first in range(9):
        server.add([10 + first, 5, 6, 7], 1)
    server.run()
    tokens = [sum(s.count for s in plan.sequences) for plan in plans_of(server, "prefill")]
    assert max(tokens) == 8


def test_prompts_are_chunked_by_rank_of_the_group() -> None:
    server = grouped(sp=2, pages=64, chunked_prefill_size=8, context=10_000)
    server.add([13, *range(4, 43)], 1)
    server.run()
    counts = [plan.sequences[0].count for plan in plans_of(server, "prefill")]
    assert counts == [16, 16, 8]


def test_whole_prompts_go_in_one_step() -> None:
    server = EchoServer(sp=1, pages=64, chunked_prefill_size=-1, max_prefill_tokens=8)
    server.add(range(4, 44), 1)
    server.run()
    assert [plan.sequences[0].count for plan in server.plans] == [40]


def test_local_requests_decode_apart_and_a_spanning_one_joins_them() -> None:
    server = grouped(sp=2, pages=64)
    server.add([11, 5, 6], 30, ignore_eos=True)
    server.add([12, 5, 6], 30, ignore_eos=True)
    for _ in range(60):
        server.turn()
    apart = {plan.group for plan in plans_of(server, "decode")}
    assert apart == {(0,), (1,)}
    server.add([13, *range(4, 20)], 4, ignore_eos=True)
    server.run()
    joined = [plan for plan in plans_of(server, "decode") if plan.group == (0, 1)]
    assert max(len(plan.sequences) for plan in joined) == 3
    assert plans_of(server, "decode")[-1].group in ((0,), (1,)), "and they part again"


def test_phases_alternate_on_a_rank() -> None:
    server = EchoServer(sp=1, pages=200, chunked_prefill_size=8, context=10_000)
    server.add([4, 5, 6], 40, ignore_eos=True)
    for _ in range(12):
        server.turn()
    server.add(range(4, 44), 2)
    del server.plans[:]
    server.run()
    until_done = server.plans[: server.plans.index(plans_of(server, "prefill")[-1])]
    phases = [plan.phase for plan in until_done]
    assert all(pair != ("prefill", "prefill") for pair in itertools.pairwise(phases))
    assert phases.count("prefill") == 4


def test_a_large_group_gets_its_turn_between_small_ones() -> None:
    server = grouped(sp=2, pages=400, chunked_prefill_size=4, context=10_000)
    for first in (11, 12, 11, 12):
        server.add([first, *range(4, 40)], 1)
    server.add([13, *range(4, 40)], 1)
    server.run()
    groups = [plan.group for plan in plans_of(server, "prefill")]
    assert groups.index((0, 1)) < 8
    waits = [index for index, group in enumerate(groups) if group == (0, 1)]
    assert max(b - a for a, b in itertools.pairwise(waits)) <= 6


def test_sp_tp_prefills_on_all_ranks_and_decodes_replicated() -> None:
    server = EchoServer(sp=3, parallel={"arch": "tp"})
    for first in range(3):
        server.add([4 + first, 6], 4)
    server.run()
    assert {plan.group for plan in server.plans} == {(0, 1, 2)}
    assert {plan.placement for plan in plans_of(server, "decode")} == {"replicated"}
    assert {plan.placement for plan in plans_of(server, "prefill")} == {"sharded"}


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
def test_a_strategy_can_be_forced(strategy: str) -> None:
    server = grouped(sp=2, parallel={"strategy": strategy})
    server.add([13, *range(4, 30)], 4)
    server.run()
    assert {plan.strategy for plan in plans_of(server, "prefill")} == {strategy}
    assert {plan.strategy for plan in plans_of(server, "decode")} == {"pass_q"}


def test_decode_placement_is_the_cost_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCosts, "decode_placement", lambda self, tokens: "replicated")
    server = grouped(sp=2)
    server.add([13, *range(4, 30)], 4)
    server.add([11, 5], 4)
    server.run()
    for plan in plans_of(server, "decode"):
        assert plan.placement == ("replicated" if len(plan.group) > 1 else "sharded")


def test_local_requests_share_slices_where_that_is_cheaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, ...]] = []

    def cheaper_together(self: StepCosts, tokens: tuple[int, ...]) -> str:
        told.append(tokens)
        return "replicated" if sum(tokens) >= 3 else "sharded"

    monkeypatch.setattr(StepCosts, "decode_placement", cheaper_together)
    server = grouped(sp=2, pages=64)
    ends = [server.add([first, 5, 6], new, ignore_eos=True) for first, new in ((11, 30), (12, 60))]
    for _ in range(20):
        server.turn()
    assert {plan.group for plan in plans_of(server, "decode")} == {(0,), (1,)}, "two stay apart"
    third = server.add([11, 7, 8], 60, ignore_eos=True)
    server.run()
    decodes = plans_of(server, "decode")
    together = [plan for plan in decodes if plan.group == (0, 1)]
    assert together and {plan.placement for plan in together} == {"replicated"}
    assert max(len(plan.sequences) for plan in together) == 3
    assert decodes[-1].group in ((0,), (1,)), "and two are apart again"
    assert (2, 1) in told
    assert {news.rid for news in server.news if news.finish is not None} == {*ends, third}


def test_local_requests_stay_apart_while_a_prompt_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepCosts, "decode_placement", lambda self, tokens: "replicated")
    server = grouped(sp=2, pages=400, chunked_prefill_size=4, context=10_000)
    for first in (11, 12):
        server.add([first, 5, 6], 300, ignore_eos=True)
    for _ in range(20):
        server.turn()
    server.add([12, *range(4, 40)], 1)
    del server.plans[:]
    server.run()
    prefills = [at for at, plan in enumerate(server.plans) if plan.phase == "prefill"]
    during = server.plans[prefills[0] : prefills[-1]]
    assert {plan.group for plan in during if plan.phase == "decode"} == {(0,), (1,)}
    assert (0, 1) in {plan.group for plan in server.plans[prefills[-1] :]}


def test_sarathi_mixes_decode_and_chunks_within_one_budget() -> None:
    server = EchoServer(sp=2, policy="sarathi", chunked_prefill_size=8, pages=64)
    for first in range(4):
        server.add([4 + first, *range(4, 30)], 12, ignore_eos=True)
    server.run()
    assert all(sum(s.count for s in plan.sequences) <= 8 for plan in server.plans)
    assert {plan.placement for plan in server.plans} == {"replicated"}
    mixed = plans_of(server, "mixed")
    assert mixed and all(any(s.count == 1 for s in plan.sequences) for plan in mixed)

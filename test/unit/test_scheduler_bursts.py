"""Bursts at the scheduler: when one begins, what ends it, and that its answer fits."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from test.kit.echo_server import EOS, EchoServer

from sps_runtime.types.errors import EngineDead
from sps_runtime.types.plan import StepPlan, StepResult


def bursts(server: EchoServer) -> list[StepPlan]:
    return [plan for plan in server.plans if plan.burst is not None]


@pytest.mark.parametrize("sp", [1, 2])
def test_a_lone_request_decodes_in_bursts(sp: int) -> None:
    server = EchoServer(sp=sp, page_size=4, pages=64)
    server.add(list(range(4, 14)), 60, ignore_eos=True)
    server.run()
    singles = [p for p in server.plans if p.phase == "decode" and p.burst is None]
    assert len(bursts(server)) >= 4 and len(singles) <= 4
    assert sum(plan.steps for plan in bursts(server)) > 50
    assert server.scheduler.state().steps_total >= 60


def test_a_burst_begins_with_known_tokens_and_has_all_its_pages() -> None:
    server = EchoServer(sp=2, page_size=2, pages=64)
    for length in (3, 9):
        server.add(list(range(4, 4 + length)), 30, ignore_eos=True)
    server.run()
    assert bursts(server)
    for plan in bursts(server):
        for sequence, stops in zip(plan.sequences, plan.burst.stops, strict=True):
            assert (sequence.board_epoch, sequence.count, stops) == (-1, 1, ())
            assert len(sequence.pages) // 4 == -(-(sequence.start + plan.steps) // 2)


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 0.5},
        {"min_new_tokens": 30},
    ],
    ids=["penalty", "early"],
)
def test_what_needs_every_token_gets_no_burst(options: dict) -> None:
    server = EchoServer(sp=1)
    server.add([4, 5], 30, ignore_eos=True, **options)
    server.run()
    assert not bursts(server)


@pytest.mark.parametrize("config", [{"overlap": False}, {"max_burst_steps": 1}, {"bursts": False}])
def test_bursts_can_be_had_without(config: dict) -> None:
    server = EchoServer(sp=1, **config)
    server.add([4, 5], 20, ignore_eos=True)
    server.run()
    assert not bursts(server)


def start(server: EchoServer, length: int = 3, n: int = 40) -> StepPlan:
    """Run a request until its first burst is under way; that plan."""
    server.add(list(range(4, 4 + length)), n, ignore_eos=True)
    while not bursts(server):
        server.turn(polls=1)
    return bursts(server)[-1]


def test_whatever_comes_hurries_the_leading_rank_once() -> None:
    server = EchoServer(sp=2, pages=64)
    start(server)
    assert server.hurried == []
    server.add([9, 9, 9], 5)
    server.turn(polls=0)
    assert server.hurried == [0]
    server.add([8, 8, 8], 5)
    server.turn(polls=0)
    assert server.hurried == [0]
    server.run()


def test_an_abort_hurries_it_too_and_is_answered_at_once() -> None:
    server = EchoServer(sp=1, pages=64)
    start(server)
    server.abort("r0")
    assert server.finals["r0"].finish.kind == "abort"
    server.turn(polls=0)
    assert server.hurried == [0]
    server.run()


def test_while_requests_wait_there_are_none() -> None:
    server = EchoServer(sp=1, max_running_requests=1, pages=64)
    server.add([4, 5, 6], 12, ignore_eos=True)
    server.add([7, 8], 12, ignore_eos=True)
    server.run()
    first_of_second = next(i for i, p in enumerate(server.plans) if p.sequences[0].start == 0 and i)
    assert not any(plan.burst for plan in server.plans[:first_of_second])
    assert any(plan.burst for plan in server.plans[first_of_second:])


def test_a_stop_within_a_burst_ends_the_answer_there() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(30):
        server = EchoServer(sp=1, vocab=8, seed=seed)
        server.add([4 + seed % 4, 5], 30)
        server.run()
        kinds[server.finals["r0"].finish.kind] += bool(bursts(server))
        assert EOS not in server.tokens["r0"][:-1]
    assert kinds["stop"] > 5


def test_news_say_where_their_tokens_stand() -> None:
    server = EchoServer(sp=2, pages=64)
    for n in (20, 33):
        server.add([4, 5, n], n, ignore_eos=True)
    server.run()
    for rid in server.requests:
        known = 0
        for item in server.news:
            if item.rid == rid and item.tokens:
                assert item.first == known
                known += len(item.tokens)
    assert any(len(item.tokens) > 1 for item in server.news)


def test_ranks_that_ran_different_steps_have_diverged() -> None:
    server = EchoServer(sp=2, parallel={"arch": "tp"})
    plan = start(server)
    assert len(plan.group) == 2
    answers: list[StepResult] = []
    while len(answers) < 2:
        result = server.world.poll()
        answers += [result] if result is not None else []
    assert {answer.epoch for answer in answers} == {plan.epoch}
    server.scheduler.on_result(answers[0])
    other = msgspec.structs.replace(answers[1], steps=answers[1].steps + 1)
    with pytest.raises(EngineDead, match="steps of epoch"):
        server.scheduler.on_result(other)

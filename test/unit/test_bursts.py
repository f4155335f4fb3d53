"""Bursts at the rank: who says when one ends, and what is told meanwhile."""

from __future__ import annotations

import mmap
import os
import random
import select
import threading
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np
import pytest

from sps_runtime.runner.bursts import END, GO_ON, LONGEST_S, Bursts, burst_step, verdict_slot
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.types.messages import TokensBatch, TokensOut
from sps_runtime.types.plan import (
    Burst,
    SampledToken,
    SamplePlan,
    SequencePlan,
    StepCounters,
    StepPlan,
    StepResult,
)
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids, unpack_ids

STOP, PAGE = 3, 4


def burst_plan(steps: int, group: tuple[int, ...] = (0, 1), live: bool = True) -> StepPlan:
    """Two sequences, the second two pages ahead."""
    sample = SamplePlan(SamplingParams())
    sequences = tuple(
        SequencePlan(slot, start, 1, pack_ids([50]), pack_ids(range(9)), sample=sample)
        for slot, start in ((0, 2), (5, 10))
    )
    burst = Burst(steps, ((STOP,), ()), ("a" if live else "", "b"), (1, 7))
    return StepPlan(21, group, sequences, "replicated", "pass_q", "decode", burst)


class Ahead:
    """Steps behind the first as `sps_kernel.StepLoop` runs them; rank 0 leads."""

    def __init__(
        self,
        plan: StepPlan,
        board: TokenBoard,
        execute: Callable[[StepPlan], StepResult],
        legs: list[tuple[int, int]],
    ) -> None:
        self._plan, self._board, self._execute, self._legs = plan, board, execute, legs
        self._results: list[StepResult] = []
        self._said = False

    def lead(self, each: bool, seconds: float, descriptor: int) -> tuple[int, bool]:
        first = index = 1 + len(self._results)
        if not self._said:
            self._go_on(index - 1)
        while True:
            self._run(index)
            index += 1
            ends = index == self._plan.steps or self._results[-1].sampled[0].token == STOP
            self._said = not (ends or select.select([descriptor], [], [], 0)[0])
            if self._said:
                self._go_on(index - 1)
            if each or not self._said:
                self._legs.append((first, index))
                return index, self._said

    def follow(self) -> None:
        for index in range(1, self._plan.steps):
            slot, epoch = verdict_slot(self._board, 0), self._plan.epoch + index - 1
            if self._board.read(np.array([slot]), np.array([epoch]), 5.0)[0] == END:
                return
            self._run(index)

    def sampled(self, step: int) -> tuple[SampledToken, ...]:
        return self._results[step - 1].sampled

    def result(self, leads: bool) -> StepResult:
        sampled = tuple(token for result in self._results for token in result.sampled)
        steps = len(self._results)
        counters = StepCounters(sent_bytes=2 * steps, compute_s=0.5 * steps)
        return StepResult(self._plan.epoch, -1, sampled, counters=counters, steps=steps)

    def _go_on(self, index: int) -> None:
        if len(self._plan.group) > 1:
            slot = verdict_slot(self._board, 0)
            self._board.write(self._plan.epoch + index, [slot], [GO_ON])

    def _run(self, index: int) -> None:
        self._results.append(self._execute(burst_step(self._plan, index, PAGE)))


class World:
    """Ranks in threads that sample what a script says; rank 0 leads. They meet in every step, as
    the sums of layers make them. Those in `native` run what is behind a first step by `Ahead`."""

    def __init__(
        self,
        ranks: int,
        script: Callable[[int], int],
        interrupted: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = lambda: 0.0,
        native: Sequence[int] = (),
        messages: bool = False,
    ) -> None:
        memory, self.descriptor = mmap.mmap(-1, board_bytes(8 + ranks)), os.eventfd(messages)
        boards = [TokenBoard(memory) for _ in range(ranks)]
        self.legs: list[tuple[int, int]] = []
        execute = [partial(self._execute, rank) for rank in range(ranks)]
        self.told: list[TokensOut] = []
        self.steps: list[list[StepPlan]] = [[] for _ in range(ranks)]
        self._script = script
        self._meeting = threading.Barrier(ranks, timeout=5.0)
        self._bursts = [
            Bursts(
                rank,
                1,
                PAGE,
                execute[rank],
                boards[rank],
                interrupted,
                self._tell,
                5.0,
                clock,
                lambda plan, rank=rank: (
                    Ahead(plan, boards[rank], execute[rank], self.legs) if rank in native else None
                ),
                self.descriptor,
            )
            for rank in range(ranks)
        ]

    def _tell(self, news: TokensBatch) -> None:
        self.told += news.items

    def _execute(self, rank: int, plan: StepPlan) -> StepResult:
        self.steps[rank].append(plan)
        self._meeting.wait()
        tokens = [(s.slot, self._script(plan.epoch) + i) for i, s in enumerate(plan.sequences)]
        sampled = () if rank else tuple(SampledToken(*pair) for pair in tokens)
        counters = StepCounters(sent_bytes=2, compute_s=0.5)
        return StepResult(plan.epoch, rank, sampled, counters=counters)

    def run(self, plan: StepPlan) -> list[StepResult]:
        results: list[StepResult | None] = [None] * len(self._bursts)

        def work(rank: int) -> None:
            results[rank] = self._bursts[rank].run(plan)

        threads = [threading.Thread(target=work, args=(r,)) for r in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
        os.close(self.descriptor)
        return [result for result in results if result is not None]


def ids(news: list[TokensOut], rid: str) -> list[tuple[int, int]]:
    return [(item.first, token) for item in news for token in item.tokens if item.rid == rid]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_steps_are_run_and_answered_once(ranks: int) -> None:
    world = World(ranks, lambda epoch: epoch)
    results = world.run(burst_plan(5, tuple(range(ranks))))
    assert [(r.epoch, r.steps, r.rank) for r in results] == [(21, 5, r) for r in range(ranks)]
    assert [s.token for s in results[0].sampled if s.slot == 0] == [21, 22, 23, 24, 25]
    assert results[0].counters == StepCounters(sent_bytes=10, compute_s=2.5)
    assert not any(result.sampled for result in results[1:])
    # All but the last step's, which goes with the answer.
    assert ids(world.told, "a") == [(1, 21), (2, 22), (3, 23), (4, 24)]
    assert ids(world.told, "b") == [(7, 22), (8, 23), (9, 24), (10, 25)]


def test_who_does_not_listen_is_not_told() -> None:
    world = World(2, lambda epoch: epoch)
    world.run(burst_plan(3, live=False))
    assert not ids(world.told, "a") and ids(world.told, "b")


def test_a_stop_ends_it_for_all_ranks_and_is_not_told() -> None:
    world = World(3, lambda epoch: STOP if epoch == 23 else 30)
    results = world.run(burst_plan(9, (0, 1, 2)))
    assert [result.steps for result in results] == [3, 3, 3]
    assert [s.token for s in results[0].sampled if s.slot == 0] == [30, 30, STOP]
    assert ids(world.told, "a") == [(1, 30), (2, 30)]


def test_another_sequences_stop_id_means_nothing() -> None:
    """The second sequence has no stop ids; it samples 3 when the first samples 2."""
    results = World(2, lambda epoch: STOP - 1).run(burst_plan(4))
    assert [result.steps for result in results] == [4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_a_message_ends_it_wherever_it_comes(seed: int) -> None:
    chance = random.Random(seed)
    after = chance.randrange(1, 8)
    looks: list[bool] = []

    def interrupted() -> bool:
        looks.append(len(looks) + 1 >= after)
        return looks[-1]

    results = World(2, lambda epoch: 30, interrupted).run(burst_plan(8))
    assert [result.steps for result in results] == [after, after]


def test_a_long_one_ends_itself() -> None:
    ticks = iter(range(1000))
    world = World(2, lambda epoch: 30, clock=lambda: next(ticks) * LONGEST_S * 0.4)
    steps = {result.steps for result in world.run(burst_plan(50))}
    assert len(steps) == 1 and steps < {2, 3, 4, 5, 6, 7, 8}


NATIVE = [(0,), (1,), (0, 1, 2)]


@pytest.mark.parametrize("native", NATIVE)
def test_whoever_runs_them_natively_all_steps_are_run_and_told(native: tuple[int, ...]) -> None:
    world = World(3, lambda epoch: epoch, native=native)
    results = world.run(burst_plan(5, (0, 1, 2)))
    assert [(r.epoch, r.steps, r.rank) for r in results] == [(21, 5, r) for r in range(3)]
    assert {(r.counters.sent_bytes, r.counters.compute_s) for r in results} == {(10, 2.5)}
    assert [s.token for s in results[0].sampled if s.slot == 0] == [21, 22, 23, 24, 25]
    assert ids(world.told, "a") == [(1, 21), (2, 22), (3, 23), (4, 24)]
    assert world.legs == ([(1, 2), (2, 3), (3, 4), (4, 5)] if 0 in native else [])


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_stop_ends_native_steps_too(native: tuple[int, ...], last: int) -> None:
    world = World(3, lambda epoch: STOP if epoch == 20 + last else 30, native=native)
    results = world.run(burst_plan(9, (0, 1, 2)))
    assert [result.steps for result in results] == [last] * 3
    assert ids(world.told, "a") == [(1 + index, 30) for index in range(last - 1)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_where_nobody_is_told_native_steps_run_in_one_go(ranks: int) -> None:
    plan = burst_plan(9, tuple(range(ranks)))
    silent = msgspec.structs.replace(plan.burst, rids=("", ""))
    plan = msgspec.structs.replace(plan, burst=silent)
    world = World(ranks, lambda epoch: epoch, native=range(ranks))
    assert [result.steps for result in world.run(plan)] == [9] * ranks
    assert world.legs == [(1, 9)] and not world.told
    stopping = World(ranks, lambda epoch: STOP if epoch == 24 else 9, native=range(ranks))
    assert [result.steps for result in stopping.run(plan)] == [4] * ranks
    assert stopping.legs == [(1, 4)]
    asking = World(ranks, lambda epoch: epoch, native=range(ranks), messages=True)
    asking.run(plan)
    assert len(asking.legs) == 8, "what is readable need not be a message"


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_message_ends_native_steps(native: tuple[int, ...], after: int) -> None:
    looks: list[None] = []

    def interrupted() -> bool:
        looks.append(None)
        return len(looks) >= after

    world = World(3, lambda epoch: 30, interrupted, native=native, messages=True)
    results = world.run(burst_plan(8, (0, 1, 2)))
    assert [result.steps for result in results] == [after] * 3


def test_each_step_is_a_plan_of_its_own() -> None:
    plan = burst_plan(6)
    for index in range(6):
        step = burst_step(plan, index, PAGE)
        assert (step.epoch, step.burst) == (21 + index, None)
        for sequence, first in zip(step.sequences, plan.sequences, strict=True):
            assert sequence.start == first.start + index
            pages = -(-(sequence.start + 1) // PAGE)
            assert unpack_ids(sequence.pages).tolist() == list(range(pages))
            board = -1 if not index else 20 + index
            assert (sequence.board_epoch, len(sequence.tokens)) == (board, 0 if index else 4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan


def test_a_leader_that_says_nothing_is_missed() -> None:
    board = TokenBoard(mmap.mmap(-1, board_bytes(8)))
    follower = Bursts(
        1, 1, PAGE, lambda plan: StepResult(plan.epoch, 1), board, bool, lambda news: None, 0.05
    )
    with pytest.raises(TimeoutError):
        follower.run(burst_plan(4))

"""Bursts of decode steps (`types.plan.Burst`): who runs them, and who says when they end.

After every step but the last the leading rank writes a verdict, "go on" or "end", to a word of the
token board that is its own; the others read it there. So all ranks of the group run the same steps
whatever reaches one of them, and when. A verdict stands until all have read it: the leading rank
writes the next one after a step that it cannot finish without them (layers' sums cross the group).
No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sps_runtime.types.messages import TokensBatch, TokensOut
from sps_runtime.types.plan import Burst, SampledToken, StepCounters, StepPlan, StepResult

LONGEST_S = 0.5
"""A burst ends after so long: the scheduler counts, and watches, what is answered."""
END, GO_ON = 0, 1


class Board(Protocol):
    """What verdicts need of a token board (`runner.token_board.TokenBoard`)."""

    waited_s: float

    @property
    def slots(self) -> int: ...

    def write(self, epoch: int, slots: Sequence[int], tokens: Sequence[int]) -> None: ...

    def read(
        self, slots: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], timeout_s: float
    ) -> npt.NDArray[np.int64]: ...


class StepsAhead(Protocol):
    """A burst's steps behind the first as this rank runs them without the interpreter
    (`runner.steps_ahead.StepsAhead`)."""

    def lead(self, each: bool, seconds: float, descriptor: int) -> tuple[int, bool]:
        """Say that the burst goes on, unless that was said, and run its next step, or several
        without `each`; how many have been run, and whether it was said that it goes on from the
        last of them."""
        ...

    def follow(self) -> None:
        """Run steps as the leading rank says, until it ends the burst."""
        ...

    def sampled(self, step: int) -> tuple[SampledToken, ...]:
        """What a step sampled that was led."""
        ...

    def result(self, leads: bool) -> StepResult:
        """The answer to all of them, which may be none."""
        ...


class Bursts:
    """Runs one rank's bursts.

    Args:
        rank: this global rank.
        tp_size: TP peers of each SP rank.
        page_size: tokens of a page.
        execute: runs one step.
        board: the host's, with a word for every rank behind those of requests.
        interrupted: whether a message from the scheduler waits.
        tell: brings tokens to the front end.
        timeout_s: how long a verdict may take.
        ahead: after the first step, a means to run the others natively; None where there is none.
        descriptor: readable whenever `interrupted` may have become true since it was asked; for
            `ahead`.
        longest_s: how long one may take.
    """

    def __init__(
        self,
        rank: int,
        tp_size: int,
        page_size: int,
        execute: Callable[[StepPlan], StepResult],
        board: Board,
        interrupted: Callable[[], bool],
        tell: Callable[[TokensBatch], None],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        ahead: Callable[[StepPlan], StepsAhead | None] = lambda plan: None,
        descriptor: int = -1,
        longest_s: float = LONGEST_S,
    ) -> None:
        self._rank = rank
        self._tp_size = tp_size
        self._page_size = page_size
        self._execute = execute
        self._board = board
        self._interrupted = interrupted
        self._tell = tell
        self._timeout_s = timeout_s
        self._clock = clock
        self._ahead = ahead
        self._descriptor = descriptor
        self._longest_s = longest_s

    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan that has a burst; the answer to it.

        Raises:
            TimeoutError: the leading rank said nothing; and what `execute` raises.
        """
        leader, until = plan.group[0] * self._tp_size, self._clock() + self._longest_s
        results = [self._execute(burst_step(plan, 0, self._page_size))]
        ahead = self._ahead(plan)
        if ahead is None:
            self._run_each(plan, leader, until, results)
            return joined(plan, results)
        if self._rank == leader:
            self._lead(plan, until, results[0].sampled, ahead)
        else:
            ahead.follow()
        return joined(plan, [*results, ahead.result(self._rank == leader)])

    def _run_each(
        self, plan: StepPlan, leader: int, until: float, results: list[StepResult]
    ) -> None:
        """Execute step after step behind the first."""
        while len(results) < plan.steps:
            index, last = len(results), results[-1]
            if self._rank != leader:
                goes_on = self._told_to_go_on(leader, plan.epoch + index - 1, results)
            else:
                goes_on = self._goes_on(plan, index - 1, last.sampled, until)
                self._say(plan, index - 1, GO_ON if goes_on else END)
            if not goes_on:
                return
            results.append(self._execute(burst_step(plan, index, self._page_size)))

    def _lead(
        self, plan: StepPlan, until: float, sampled: Sequence[SampledToken], ahead: StepsAhead
    ) -> None:
        """As the leading rank, run the steps behind the first: one after another where somebody is
        told of each."""
        assert plan.burst is not None
        each, done, said = any(plan.burst.rids), 1, False
        while done < plan.steps:
            if said:
                self._tell_of(plan.burst, done - 1, sampled)
            elif not self._goes_on(plan, done - 1, sampled, until):
                return self._say(plan, done - 1, END)
            done, said = ahead.lead(each, until - self._clock(), self._descriptor)
            sampled = ahead.sampled(done - 1)

    def _goes_on(
        self, plan: StepPlan, index: int, sampled: Sequence[SampledToken], until: float
    ) -> bool:
        """Tell what a step sampled, which is not the last; whether there is another one."""
        assert plan.burst is not None
        if stops(plan.burst, sampled):
            return False
        self._tell_of(plan.burst, index, sampled)
        return not (self._clock() > until or self._interrupted())

    def _tell_of(self, burst: Burst, index: int, sampled: Sequence[SampledToken]) -> None:
        if news := tokens_of(burst, index, sampled):
            self._tell(TokensBatch(news))

    def _say(self, plan: StepPlan, index: int, verdict: int) -> None:
        """As the leading rank, say to those who follow, if any, whether there is another step."""
        if len(plan.group) * self._tp_size > 1:
            slot = verdict_slot(self._board, self._rank)
            self._board.write(plan.epoch + index, [slot], [verdict])

    def _told_to_go_on(self, leader: int, epoch: int, results: list[StepResult]) -> bool:
        """Wait for the leading rank's verdict; what that takes counts as waiting for others."""
        before = self._board.waited_s
        word, epochs = np.array([verdict_slot(self._board, leader)]), np.array([epoch])
        verdict = int(self._board.read(word, epochs, self._timeout_s)[0])
        if waited := self._board.waited_s - before:
            counters = results[-1].counters
            exposed = msgspec.structs.replace(counters, exposed_s=counters.exposed_s + waited)
            results[-1] = msgspec.structs.replace(results[-1], counters=exposed)
        return verdict == GO_ON


def verdict_slot(board: Board, leader: int) -> int:
    """Where a leading rank, named globally, writes its verdicts."""
    return board.slots - 1 - leader


def burst_step(plan: StepPlan, index: int, page_size: int) -> StepPlan:
    """The plan of one step of a burst; of the first, all but the burst itself."""
    epoch = plan.epoch + index
    sequences = tuple(
        msgspec.structs.replace(
            sequence,
            start=sequence.start + index,
            tokens=b"" if index else sequence.tokens,
            pages=sequence.pages[: 4 * ((sequence.start + index) // page_size + 1)],
            board_epoch=epoch - 1 if index else sequence.board_epoch,
        )
        for sequence in plan.sequences
    )
    return msgspec.structs.replace(plan, epoch=epoch, sequences=sequences, burst=None)


def stops(burst: Burst, sampled: Sequence[SampledToken]) -> bool:
    """Whether a sequence ends with what a step sampled. Tokens come in the order of sequences."""
    return any(
        one.token in ids or one.failure is not None
        for one, ids in zip(sampled, burst.stops, strict=True)
    )


def tokens_of(burst: Burst, index: int, sampled: Sequence[SampledToken]) -> tuple[TokensOut, ...]:
    """What the front end is told of a step, where no sequence stops."""
    sequences = zip(burst.rids, burst.firsts, sampled, strict=True)
    return tuple(_news(rid, first + index, one) for rid, first, one in sequences if rid)


def _news(rid: str, first: int, sampled: SampledToken) -> TokensOut:
    logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
    return TokensOut(rid, (sampled.token,), logprobs=logprobs, first=first)


def joined(plan: StepPlan, results: Sequence[StepResult]) -> StepResult:
    """One rank's answer to a burst from those of its steps."""
    counters = [result.counters for result in results]
    fields = StepCounters.__struct_fields__
    sums = {name: sum(getattr(part, name) for part in counters) for name in fields}
    return msgspec.structs.replace(
        results[0],
        epoch=plan.epoch,
        sampled=tuple(sampled for result in results for sampled in result.sampled),
        counters=StepCounters(**sums),
        steps=sum(result.steps for result in results),
    )

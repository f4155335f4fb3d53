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

LONGEST_S = 0.25
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

    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan that has a burst; the answer to it.

        Raises:
            TimeoutError: the leading rank said nothing; and what `execute` raises.
        """
        burst = plan.burst
        assert burst is not None
        leader, until = plan.group[0] * self._tp_size, self._clock() + LONGEST_S
        alone = len(plan.group) * self._tp_size == 1
        results: list[StepResult] = []
        while len(results) < burst.steps:
            step = burst_step(plan, len(results), self._page_size)
            result = self._execute(step)
            results.append(result)
            if len(results) == burst.steps:
                break
            if self._rank != leader:
                if not self._go_on(leader, step.epoch, results):
                    break
                continue
            stopped = stops(burst, result)
            if not stopped and (news := tokens_of(burst, len(results) - 1, result)):
                # First of all: while the others wait for the verdict, their cores are free for it.
                self._tell(TokensBatch(news))
            goes_on = not (stopped or self._clock() > until or self._interrupted())
            if not alone:
                verdict = GO_ON if goes_on else END
                self._board.write(step.epoch, [self._word(leader)], [verdict])
            if not goes_on:
                break
        return joined(plan, results)

    def _go_on(self, leader: int, epoch: int, results: list[StepResult]) -> bool:
        """Wait for the leading rank's verdict; what that takes counts as waiting for others."""
        before = self._board.waited_s
        word, epochs = np.array([self._word(leader)]), np.array([epoch])
        verdict = int(self._board.read(word, epochs, self._timeout_s)[0])
        if waited := self._board.waited_s - before:
            counters = results[-1].counters
            exposed = msgspec.structs.replace(counters, exposed_s=counters.exposed_s + waited)
            results[-1] = msgspec.structs.replace(results[-1], counters=exposed)
        return verdict == GO_ON

    def _word(self, leader: int) -> int:
        return self._board.slots - 1 - leader


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


def stops(burst: Burst, result: StepResult) -> bool:
    """Whether a sequence ends with what a step sampled. Tokens come in the order of sequences."""
    return any(
        sampled.token in ids or sampled.failure is not None
        for sampled, ids in zip(result.sampled, burst.stops, strict=True)
    )


def tokens_of(burst: Burst, index: int, result: StepResult) -> tuple[TokensOut, ...]:
    """What the front end is told of a step, where no sequence stops."""
    sequences = zip(burst.rids, burst.firsts, result.sampled, strict=True)
    return tuple(_news(rid, first + index, sampled) for rid, first, sampled in sequences if rid)


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
        steps=len(results),
    )

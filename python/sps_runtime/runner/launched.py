"""Steps that were launched: what is left to do is to wait for them and to say what they did."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sps_runtime.distributed.communicator import Traffic
from sps_runtime.ops.devices import Fence
from sps_runtime.runner.device_board import LateTokens
from sps_runtime.types.attention import SparseCounters
from sps_runtime.types.plan import (
    HiddenState,
    PromptLogprobs,
    SampledToken,
    StepCounters,
    StepPlan,
    StepResult,
)

AHEAD = 2
"""Steps on the device and not answered for: one runs while the next is prepared."""
POLL_S = 50e-6
"""Between two looks for a plan or a step's end, whichever comes first."""


@dataclass(frozen=True)
class Ran:
    """What a rank did in a step: rows computed, what it sampled and judged, hidden states that are
    answers, what it left out; tokens that are still on the device."""

    rows: int
    sampled: tuple[SampledToken, ...]
    judged: tuple[PromptLogprobs, ...] = ()
    hidden_states: tuple[HiddenState, ...] = ()
    sparse: tuple[SparseCounters, ...] = ()
    late: LateTokens | None = None


@dataclass(frozen=True)
class Launched:
    """One step.

    Attributes:
        fence: behind its last kernel: an acknowledgement says that this rank's reads are over.
        began: when it was taken up, by `time.perf_counter`.
        traffic, waited_s: what crossed, and how long the host waited for others.
        layers: of the model.
    """

    epoch: int
    rank: int
    ran: Ran
    fence: Fence
    began: float
    traffic: Traffic
    waited_s: float
    layers: int

    @property
    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self.fence.done

    def result(self, since: float = 0.0) -> StepResult:
        """Wait for the step's end; its tokens are on the host's board then.

        Args:
            since: when the step before it ended: until then the device was that one's.
        """
        ran, took = self.ran, self.traffic
        sampled = ran.sampled if ran.late is None else ran.late.settle()
        self.fence.wait()
        exposed = took.exposed_s + self.waited_s
        counters = StepCounters(
            sent_bytes=took.attention_bytes,
            physical_bytes=took.physical_bytes,
            linear_bytes=took.linear_bytes,
            exposed_s=exposed,
            compute_s=max(0.0, time.perf_counter() - max(self.began, since) - exposed),
            token_layers=ran.rows * self.layers,
        )
        return StepResult(
            self.epoch,
            self.rank,
            sampled,
            ran.judged,
            counters,
            ran.sparse,
            hidden_states=ran.hidden_states,
        )


class Launcher(Protocol):
    """What a lane needs of a runner (`runner.model_runner.ModelRunner`)."""

    def runs_late(self, plan: StepPlan) -> bool:
        """Whether `launch` may return before this step's tokens are known."""
        ...

    def launch(self, plan: StepPlan, late: bool) -> Launched:
        """Start a step; with `late`, without waiting for it."""
        ...


class Lane:
    """One rank's steps in the order of their plans, some of them launched ahead; so are answers.

    A step whose tokens pass through the host, or that needs other ranks, is started when all before
    it are answered for: whoever waits for this rank's tokens has them then, and no two ranks wait
    for one another.

    Args:
        rank: global.
        answer: takes results in order. A step that raises is told of as one (`StepResult.error`),
            and raises.
    """

    def __init__(self, runner: Launcher, rank: int, answer: Callable[[StepResult], None]) -> None:
        self._runner, self._rank, self._answer = runner, rank, answer
        self._under_way: deque[Launched] = deque()
        self._ended = 0.0

    @property
    def busy(self) -> bool:
        """Whether a step has no answer yet."""
        return bool(self._under_way)

    def take(self, plan: StepPlan) -> None:
        """Start a plan's step, and answer for those that have to be over by then."""
        with self._telling(plan.epoch):
            late = self._runner.runs_late(plan)
        while len(self._under_way) >= (AHEAD if late else 1):
            self._finish()
        with self._telling(plan.epoch):
            self._under_way.append(self._runner.launch(plan, late))
        if not late:
            self._finish()

    def run(self, plan: StepPlan, execute: Callable[[StepPlan], StepResult]) -> None:
        """Answer for all, then for a plan that is executed by other means."""
        self.drain()
        with self._telling(plan.epoch):
            result = execute(plan)
        self._answer(result)

    def poll(self) -> bool:
        """Answer for the oldest step if it is over; whether it was."""
        if not self._under_way or not self._under_way[0].done:
            return False
        self._finish()
        return True

    def drain(self) -> None:
        """Answer for all."""
        while self._under_way:
            self._finish()

    def _finish(self) -> None:
        launched = self._under_way.popleft()
        with self._telling(launched.epoch):
            result = launched.result(self._ended)
        self._ended = time.perf_counter()
        self._answer(result)

    @contextmanager
    def _telling(self, epoch: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._answer(StepResult(epoch, self._rank, error=reason))
            raise

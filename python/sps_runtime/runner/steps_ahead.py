"""A burst's steps behind the first, replayed one after another without the interpreter in between.

`sps_kernel.StepLoop` runs them: it takes tokens and verdicts from the token board and puts them
there as `runner.bursts` and `runner.publish` do, so it does not matter to a rank whether its peers
run their steps this way. What differs from step to step is computed for all of them beforehand.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from sps_runtime.attention.context import AttentionContext
from sps_runtime.runner.bursts import burst_step, verdict_slot
from sps_runtime.runner.sampler import largest_is_all, sample
from sps_runtime.runner.step_graph import StepReplays
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.types.plan import SampledToken, StepCounters, StepPlan, StepResult


class StepsAhead:
    """One rank's part in a burst after its first step.

    Args:
        plan: of the burst; its sampling needs to know of no other tokens.
        means: the rank's.
        replays: what to replay.
        board: the host's.
        timeout_s: how long a verdict may take.
    """

    def __init__(
        self,
        plan: StepPlan,
        means: AttentionContext,
        replays: StepReplays,
        board: TokenBoard,
        timeout_s: float,
    ) -> None:
        assert plan.burst is not None
        self._plan, self._means, self._replays = plan, means, replays
        self._board, self._timeout_s = board, timeout_s
        self._began = time.perf_counter()
        self._slots = [sequence.slot for sequence in plan.sequences]
        self._tokens_SR = np.zeros((plan.steps, len(self._slots)), dtype=np.int64)
        self._sampled: dict[int, tuple[SampledToken, ...]] = {}
        self._greedy = all(
            sequence.sample is not None and largest_is_all(sequence.sample)
            for sequence in plan.sequences
        )
        stops = [(row, token) for row, ids in enumerate(plan.burst.stops) for token in ids]
        self._stops = np.array(stops, dtype=np.int64).reshape(-1, 2)
        self._loop = self._make_loop()
        self._done = 1

    def _make_loop(self) -> Any:
        plan, tp_size = self._plan, self._means.mesh.tp_size
        alone = len(plan.group) * tp_size == 1
        return self._replays.recording.loop(
            self._replays.tokens_T,
            self._replays.feeds,
            board=self._board.memory,
            slots=np.array(self._slots),
            epoch=plan.epoch,
            verdict=-1 if alone else verdict_slot(self._board, plan.group[0] * tp_size),
            spin_us=1e6 * self._board.spin_s,
        )

    def lead(self, each: bool, seconds: float, descriptor: int) -> tuple[int, bool]:
        """Say that the burst goes on, unless that was said; run and sample one step, and others
        until one samples a stop id, `seconds` are over, something can be read from `descriptor`, or
        none is left.

        Args:
            each: return after one step. The others then go on from it if nothing ends the burst.

        Returns:
            How many steps of the burst have been run, and whether others go on from the last.
        """
        first = self._done
        if not self._greedy:
            self._done += self._loop.lead(first, first)
            self._sample(first)
            return self._done, False
        self._done += self._loop.lead(
            first,
            self._plan.steps - 1,
            each=each,
            sampled=self._tokens_SR,
            stops=self._stops,
            seconds=max(0.0, seconds),
            descriptor=descriptor,
        )
        return self._done, self._loop.goes_on

    def follow(self) -> None:
        """Run steps as the leading rank says."""
        self._done += self._loop.follow(self._done, self._plan.steps - 1, self._timeout_s)

    def sampled(self, step: int) -> tuple[SampledToken, ...]:
        """The tokens of a step that was led, in the order of sequences."""
        if not self._greedy:
            return self._sampled[step]
        tokens: list[int] = self._tokens_SR[step].tolist()
        return tuple(map(SampledToken, self._slots, tokens))

    def result(self, leads: bool) -> StepResult:
        """The answer to all these steps."""
        steps = range(1, self._done)
        sampled = [token for step in steps for token in self.sampled(step)] if leads else []
        return StepResult(
            self._plan.epoch,
            self._means.mesh.rank,
            tuple(sampled),
            counters=self._counters(len(steps)),
            steps=len(steps),
        )

    @torch.inference_mode()
    def _sample(self, step: int) -> None:
        plan = burst_step(self._plan, step, self._means.store.shape.page_size)
        found = sample(self._replays.recording.result, plan, range(len(self._slots)), {})
        self._sampled[step] = tuple(found)
        self._board.write(plan.epoch, self._slots, [sampled.token for sampled in found])

    def _counters(self, steps: int) -> StepCounters:
        took, replays = self._means.traffic.take(), self._replays
        exposed_s = took.exposed_s + self._loop.waited_s
        remote_bytes = int(replays.remote_bytes_S[1 : 1 + steps].sum())
        return StepCounters(
            sent_bytes=steps * replays.attention_bytes + remote_bytes,
            physical_bytes=steps * replays.physical_bytes,
            linear_bytes=steps * replays.linear_bytes,
            exposed_s=exposed_s,
            compute_s=max(0.0, time.perf_counter() - self._began - exposed_s),
            token_layers=steps * len(self._slots) * self._means.store.shape.layers,
        )


def samples_alone(plan: StepPlan) -> bool:
    """Whether the tokens of a burst's steps are sampled without knowledge of one another."""
    return not any(
        sequence.sample is None
        or sequence.sample.params.penalized
        or sequence.sample.params.grammar
        for sequence in plan.sequences
    )

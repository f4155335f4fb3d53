"""Bursts: decode steps that a group runs by itself, without a plan and an answer for each.

Where ranks fill a machine's cores, every plan and every answer takes a core from one of them, and
the others wait for it. A batch that cannot change for some steps needs none: its plan says how many
steps it may run (`types.plan.Burst`), and any message ends it after the step that is running.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from sps_runtime.scheduler.policies.view import Step, View
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.plan import Burst, Placement

FEWEST = 4
"""A shorter burst is not worth waiting for the tokens under way, which it must know."""


def burst_steps(view: View, runs: Items[Run], placement: Placement, ranks: int) -> int:
    """Steps of the burst that the next decode step of `runs` may begin, once all their tokens are
    known; 1 where their batch may change: requests wait or are being prefilled."""
    if view.burst < FEWEST or view.waiting or (ranks > 1 and placement != "replicated"):
        return 1
    if view.prefilling:
        return 1
    steps = min([view.burst, *(map(_steps, runs))])
    return steps if steps >= FEWEST else 1


def _steps(run: Run) -> int:
    """Tokens of a run that are sampled alike, without the scheduler's knowledge of others."""
    sequence, sparse = run.sequence, run.sequence.sparse
    known = sequence.generated + run.unknown
    early = known < sequence.request.sampling.min_new_tokens
    alone = sequence.needs_history or (sparse is not None and sparse.decode == "sparse")
    return 1 if early or alone or sequence.prompt_logprobs_due else sequence.max_new - known


def plan_burst(step: Step) -> Burst:
    """What a burst's plan says beyond its first step."""
    sequences = [run.sequence for run, _ in step.items]
    return Burst(
        steps=step.steps,
        stops=tuple(tuple(sorted(sequence.stop_ids)) for sequence in sequences),
        rids=tuple(sequence.rid if sequence.request.live else "" for sequence in sequences),
        firsts=tuple(sequence.generated for sequence in sequences),
    )

"""Decode groups: queries travel to where KV lies, so who shares an owner decodes together."""

from __future__ import annotations

from sps_runtime.scheduler.bursts import burst_steps
from sps_runtime.scheduler.policies.view import Step, View, mask_ranks
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.plan import Placement

Component = tuple[int, list[Run]]
"""Ranks, and runs whose KV lies on them."""


def decode_steps(view: View) -> list[Step]:
    """One step per connected component of the runs' owner sets.

    Runs local to different ranks decode apart, without ever meeting, unless slices of the weights
    for all are cheaper (`_joined`); one run over two ranks pulls everything on both into one step.
    A component goes when all its runs can: a run that is a step
    behind would otherwise stay so, and halve the batch. Only a run still waiting for its first
    token is left behind, so that decode does not stand still for a prefill.
    """
    runs = [run for run in view.runs.values() if run.decodes]
    while True:
        components = _joined(view, _components(view, runs))
        blocked = [
            run for mask, runs in components for run in runs if not view.may_decode(run, mask)
        ]
        late = {run.handle for run in blocked if run.sent == run.target}
        if not late:
            break
        runs = [run for run in runs if run.handle not in late]
    spread = view.parallel.arch == "tp"
    waiting = {run.handle for run in blocked}
    steps = []
    for mask, members in components:
        if waiting.isdisjoint(run.handle for run in members):
            items, placement = [(run, 1) for run in members], _placement(view, mask, members)
            burst = burst_steps(view, members, placement, mask.bit_count())
            if burst > 1 and any(run.unknown for run in members):
                continue  # A burst starts from known tokens: a stop among them must not start it.
            steps.append(Step(mask, items, "decode", placement, "pass_q", spread, burst))
    return steps


def _components(view: View, runs: list[Run]) -> list[Component]:
    by_mask: dict[int, list[Run]] = {}
    for run in runs:
        by_mask.setdefault(view.decode_mask(run), []).append(run)
    components: list[Component] = []
    for mask, runs in by_mask.items():
        apart = []
        for other_mask, other_runs in components:
            if other_mask & mask:
                mask, runs = mask | other_mask, other_runs + runs
            else:
                apart.append((other_mask, other_runs))
        components = [*apart, (mask, runs)]
    return components


def _joined(view: View, components: list[Component]) -> list[Component]:
    """All components as one where that reads weights sooner: each rank a slice for all tokens, not
    the whole for its own. Not while a prompt is computed, whose ranks would hold up all others."""
    if len(components) < 2 or view.prefilling:
        return components
    mask, runs = 0, list[Run]()
    for part, members in components:
        mask, runs = mask | part, runs + members
    return [(mask, runs)] if _placement(view, mask, runs) == "replicated" else components


def _placement(view: View, mask: int, runs: list[Run]) -> Placement:
    if view.parallel.arch == "tp":
        return "replicated"
    ranks = mask_ranks(mask)
    if len(ranks) == 1:
        return "sharded"
    tokens = dict.fromkeys(ranks, 0)
    page_size = view.cache_config.page_size
    for run in runs:
        page = run.sent // page_size
        if page < len(run.table.pages):
            tokens[run.table.owner(page)] += 1
        else:
            tokens[min(tokens, key=lambda rank: tokens[rank])] += 1
    return view.costs.decode_placement(tuple(tokens.values()))

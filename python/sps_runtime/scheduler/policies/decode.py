"""Decode groups: queries travel to where KV lies, so who shares an owner decodes together."""

from __future__ import annotations

from sps_runtime.scheduler.policies.view import Step, View, mask_ranks
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.plan import Placement


def decode_steps(view: View) -> list[Step]:
    """One step per connected component of the runs' owner sets.

    Runs local to different ranks decode apart, without ever meeting; one run over two ranks pulls
    everything on both into one step. A component waits until all its runs can go.
    """
    by_mask: dict[int, list[Run]] = {}
    for run in view.runs.values():
        if run.decodes:
            by_mask.setdefault(view.decode_mask(run), []).append(run)
    spread = view.parallel.arch == "tp"
    steps = []
    for mask, runs in _components(by_mask):
        if all(view.may_decode(run, mask) for run in runs):
            items, placement = [(run, 1) for run in runs], _placement(view, mask, runs)
            steps.append(Step(mask, items, "decode", placement, "pass_q", spread))
    return steps


def _components(by_mask: dict[int, list[Run]]) -> list[tuple[int, list[Run]]]:
    components: list[tuple[int, list[Run]]] = []
    for mask, runs in by_mask.items():
        apart = []
        for other_mask, other_runs in components:
            if other_mask & mask:
                mask, runs = mask | other_mask, other_runs + runs
            else:
                apart.append((other_mask, other_runs))
        components = [*apart, (mask, runs)]
    return components


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

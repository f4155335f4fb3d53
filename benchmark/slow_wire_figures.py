"""What `slow_wire.py`'s runs come to: seconds a layer, what the pipeline hid, and crossovers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from slow_wire_cells import LAYERS, STRATEGIES, Cell

UNLIMITED = 1000.0
"""Where a wire without a limit stands among rates, in megabits a second."""
VOID = 1.05
"""What the pipeline hid says nothing where a run in one piece takes longer than the sum of both
parts by this factor: something else was slow."""

SMALL = 0.1
"""Nor where less than this share of a run could be hidden: runs differ by several percent."""

Rows = Mapping[str, dict[str, Any]]
Point = tuple[float, float]
"""Megabits a second, seconds a layer."""


def figures(done: Rows) -> dict[str, float]:
    """Of each run seconds a layer, and what all layers would take; of pairs what was hidden."""
    found: dict[str, float] = {}
    for name, row in done.items():
        found[f"ttft_s_per_layer_{name}"] = row["ttft_s"] / row["layers"]
        extrapolated = "" if row["layers"] == LAYERS else "extrapolated_"
        found[f"ttft_s_{extrapolated}8_layers_{name}"] = row["ttft_s"] / row["layers"] * LAYERS
    for name, row in done.items():
        together = done.get(name.replace("_sequential", ""))
        if row["mbit"] and not row["pipeline"] and together and together is not row:
            found |= _hidden(row, together, done)
    for tokens in sorted({row["tokens"] for row in done.values()}):
        for one, other, mbit, _ in crossovers(done, tokens):
            found[f"crossover_mbit_{one}_{other}_{tokens}"] = mbit
    return found


def _hidden(row: dict[str, Any], pipelined: dict[str, Any], done: Rows) -> dict[str, float]:
    """Of one layer; computing is what the same takes on a wire without a limit."""
    free = done.get(Cell(row["strategy"], False, row["tokens"], 0.0).name)
    if free is None or row["layers"] != pipelined["layers"]:
        return {}
    comp = free["ttft_s"] / free["layers"]
    comm = max(row["wire_bytes"]) * 8e-6 / row["mbit"] / row["layers"]
    sequential, flying = row["ttft_s"] / row["layers"], pipelined["ttft_s"] / row["layers"]
    name = Cell(row["strategy"], True, row["tokens"], row["mbit"]).name
    found = {
        f"comm_s_per_layer_{name}": comm,
        f"comp_s_per_layer_{name}": comp,
        f"sequential_over_sum_{name}": sequential / (comp + comm),
    }
    hideable = sequential - max(comp, comm)
    share = (sequential - flying) / hideable
    void = "void_" if sequential > VOID * (comp + comm) else ""
    void = "small_" if hideable < SMALL * sequential else void
    return {**found, f"hidden_share_{void}{name}": share}


def curve(done: Rows, strategy: str, pipeline: bool, tokens: int) -> list[Point]:
    """A strategy's points, the slowest wire first."""
    wanted = (strategy, pipeline, tokens)
    return sorted(
        (row["mbit"] or UNLIMITED, row["ttft_s"] / row["layers"])
        for row in done.values()
        if (row["strategy"], row["pipeline"], row["tokens"]) == wanted
    )


def crossovers(done: Rows, tokens: int) -> Iterator[tuple[str, str, float, float]]:
    """(strategy, strategy, megabits a second, seconds a layer) where two strategies, each as
    fast as it goes, change places; between measured rates as lines on two logarithmic axes."""
    best = {
        strategy: curve(done, strategy, strategy != "tp", tokens)
        or curve(done, strategy, False, tokens)
        for strategy in STRATEGIES
    }
    for one, other in itertools.combinations(STRATEGIES, 2):
        mine, its = dict(best[one]), dict(best[other])
        rates = sorted(mine.keys() & its.keys() - {UNLIMITED})
        for low, high in itertools.pairwise(rates):
            before, after = (math.log(mine[rate] / its[rate]) for rate in (low, high))
            if before * after < 0:
                at = before / (before - after)
                mbit = math.exp(math.log(low) + at * math.log(high / low))
                seconds = math.log(mine[low]) + at * math.log(mine[high] / mine[low])
                yield one, other, mbit, math.exp(seconds)

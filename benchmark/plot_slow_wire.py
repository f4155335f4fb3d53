"""Draw `slow_wire.py`'s figures: python benchmark/plot_slow_wire.py [RESULTS] [PNG]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

UNLIMITED = 1000.0
"""Where a wire without a limit is drawn, in megabits a second."""


def draw(axes: Axes, rows: list[dict[str, Any]], tokens: int) -> None:
    """Seconds a layer over the wire's rate, a line for each strategy."""
    kinds = sorted({(row["strategy"], row["pipeline"]) for row in rows})
    for strategy, pipeline in kinds:
        mine = [row for row in rows if (row["strategy"], row["pipeline"]) == (strategy, pipeline)]
        points = sorted((row["mbit"] or UNLIMITED, row["ttft_s"] / row["layers"]) for row in mine)
        label = strategy + (", in flight" if pipeline else "")
        axes.plot(*zip(*points, strict=True), "o-" if pipeline else "s--", label=label)
    axes.set(xscale="log", yscale="log", title=f"{tokens} tokens", xlabel="Mb/s (1000: no limit)")
    axes.legend(fontsize=7)


def main(
    source: str = "benchmark/results/slow_wire.json", target: str = "docs/slow_wire.png"
) -> None:
    rows = list(json.loads(Path(source).read_text())["raw"].values())
    lengths = sorted({row["tokens"] for row in rows})
    figure, panels = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for axes, tokens in zip(panels[0], lengths, strict=True):
        draw(axes, [row for row in rows if row["tokens"] == tokens], tokens)
    panels[0][0].set_ylabel("seconds to the first token, a layer")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])

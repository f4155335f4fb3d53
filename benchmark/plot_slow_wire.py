"""Draw `slow_wire.py`'s figures: python benchmark/plot_slow_wire.py [RESULTS] [PNG]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from slow_wire_cells import STRATEGIES
from slow_wire_figures import Rows, crossovers, curve


def draw(axes: Axes, done: Rows, tokens: int) -> None:
    """Seconds a layer over the wire's rate, a colour for each strategy; circles where two cross."""
    for number, strategy in enumerate(STRATEGIES):
        for pipeline, style in ((False, "s--"), (True, "o-")):
            points = curve(done, strategy, pipeline, tokens)
            if points:
                label = strategy + (", in flight" if pipeline else "")
                rates, seconds = zip(*points, strict=True)
                axes.plot(rates, seconds, style, color=f"C{number}", label=label, markersize=4)
    for _, _, mbit, seconds in crossovers(done, tokens):
        axes.plot(mbit, seconds, "o", color="black", fillstyle="none", markersize=11)
    axes.set(xscale="log", yscale="log", title=f"{tokens} tokens", xlabel="Mb/s (1000: no limit)")
    axes.legend(fontsize=7)


def main(
    source: str = "benchmark/results/slow_wire.json", target: str = "docs/slow_wire.png"
) -> None:
    done: Rows = json.loads(Path(source).read_text())["raw"]
    lengths = sorted({row["tokens"] for row in done.values()})
    figure, panels = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for axes, tokens in zip(panels[0], lengths, strict=True):
        draw(axes, done, tokens)
    panels[0][0].set_ylabel("seconds to the first token, a layer")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])

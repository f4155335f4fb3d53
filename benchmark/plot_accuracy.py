"""Draw docs/accuracy.png from benchmark/results/accuracy.json: answers against bytes and density.

python benchmark/plot_accuracy.py [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from accuracy_cases import KINDS
from accuracy_figures import PAGE, by_cell, cell_figures
from accuracy_setups import setup

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (16384,)
STYLES = {
    "block": ("#08519c", "o", "block"),
    "oracle": ("#31a354", "s", "oracle, shared by superblocks"),
    "quest": ("#e6550d", "^", "Quest"),
    "mean": ("#fdae6b", "v", "mean key"),
    "vertical_slash": ("#756bb1", "D", "vertical-slash"),
    "xattention": ("#9e9ac8", "P", "XAttention"),
    "stride": ("#636363", "X", "stride (CSPS)"),
    "null": ("#bdbdbd", "x", "null"),
    "dense": ("#000000", "*", "dense"),
}


def points(rows: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """One for each setup and judge that was asked about the first document of mixed facts: right
    answers (mean over its tasks, worst task), bytes, density."""
    first = [row for row in rows if row["kind"] == "mixed" and row["document"] == 0]
    wanted = (length, "end", "sparse")
    cells = {key: mine for key, mine in by_cell(first).items() if key[:3] == wanted}
    found = []
    for (*_, name), mine in sorted(cells.items()):
        values, _ = cell_figures(mine, [])
        shares = [values[f"right_{task}"] for task in KINDS["mixed"]]
        found.append(
            {
                "estimator": setup(name).estimator,
                "shared": setup(name).settings.superblock > PAGE,
                "mean": 100 * sum(shares) / len(shares),
                "worst": 100 * min(shares),
                "density": 100 * values["density"],
                "bytes": values.get("bytes_per_token_layer_p8"),
            }
        )
    return found


def draw(axes: Axes, found: list[dict[str, Any]], x: str) -> None:
    for estimator, (colour, marker, label) in STYLES.items():
        for shared, filled in ((True, True), (False, False)):
            mine = [p for p in found if (p["estimator"], p["shared"]) == (estimator, shared)]
            mine = [p for p in mine if p[x] is not None]
            mine.sort(key=lambda p: p[x])
            if not mine:
                continue
            face = colour if filled else "none"
            name = label if filled else f"{label}, each block for itself"
            axes.plot(
                [p[x] for p in mine],
                [p["mean"] for p in mine],
                color=colour,
                marker=marker,
                markerfacecolor=face,
                linewidth=1,
                label=name,
            )
            axes.vlines(
                [p[x] for p in mine],
                [p["worst"] for p in mine],
                [p["mean"] for p in mine],
                color=colour,
                linewidth=0.6,
                alpha=0.6,
            )
    axes.set_xscale("log")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)


def main() -> None:
    names = sys.argv[1:]
    source = Path(names[0]) if names else ROOT / "benchmark" / "results" / "accuracy.json"
    target = Path(names[1]) if len(names) > 1 else ROOT / "docs" / "accuracy.png"
    rows = json.loads(source.read_text())["raw"]["rows"]
    picture, axes = pyplot.subplots(len(LENGTHS), 2, figsize=(12, 5.2), dpi=120, squeeze=False)
    for row, length in enumerate(LENGTHS):
        found = points(rows, length)
        for column, (x, words) in enumerate(
            (("bytes", "logical bytes of a token and layer, P = 8"), ("density", "density, %"))
        ):
            draw(axes[row][column], found, x)
            axes[row][column].set_title(f"{length} tokens", fontsize=10)
            axes[row][column].set_xlabel(words)
        axes[row][0].set_ylabel("right answers, %: mean of tasks, down to the worst")
    handles, labels = axes[0][1].get_legend_handles_labels()
    picture.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    picture.tight_layout(rect=(0, 0.13, 1, 1))
    picture.savefig(target)


if __name__ == "__main__":
    main()

"""Draw docs/gate.png from benchmark/results/gate.json: unions, estimators, answers.

python benchmark/plot_gate.py [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "mass 0.99 Bq64": ("99% of the mass", "#08519c", "-"),
    "mass 0.95 Bq64": ("95% of the mass", "#3182bd", "-"),
    "mass 0.9 Bq64": ("90% of the mass", "#6baed6", "-"),
    "budget 0.15 Bq64": ("15% of the pages, oracle", "#e6550d", "-"),
    "budget 0.1 Bq64": ("10% of the pages, oracle", "#fdae6b", "-"),
    "budget 0.15 Bq1024": ("15%, superblocks of 1024", "#31a354", "-"),
    "budget 0.1 Bq1024": ("10%, superblocks of 1024", "#a1d99b", "-"),
    "sketch 2 bits 4 rows budget 0.1 Bq1024": ("the same, by the sketch", "#a1d99b", ":"),
}


def main() -> None:
    names = sys.argv[1:]
    source = Path(names[0]) if names else ROOT / "benchmark" / "results" / "gate.json"
    target = Path(names[1]) if len(names) > 1 else ROOT / "docs" / "gate.png"
    result = json.loads(source.read_text())
    layers = result["raw"]["layers"]
    length = max(row["length"] for row in layers)
    picture, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), dpi=130)
    unions(axes[0], [row for row in layers if row["length"] == length], length)
    recalls(axes[1], layers)
    answers(axes[2], result["raw"]["accuracy"])
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    note = f"embedded model, fp32, pages and query blocks of 64; commit {result['commit']}"
    picture.text(0.99, 0.01, note, ha="right", fontsize=6)
    picture.tight_layout()
    picture.savefig(target)


def unions(axis: Axes, rows: list[dict[str, Any]], length: int) -> None:
    """Union share against SP degree, mean over layers, heads and documents."""
    heads = [head for row in rows for head in row["heads"]]
    for key, (label, colour, line) in SETS.items():
        shares = [statistics.fmean(h[f"u {key} P{ranks}"] for h in heads) for ranks in (2, 4, 8)]
        axis.plot((2, 4, 8), shares, line, marker="o", color=colour, label=label)
    axis.axhline(0.3, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_xticks((2, 4, 8), ("2", "4", "8"))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("SP ranks, contiguous shards")
    axis.set_ylabel("union share u of the causally needed remote KV")
    axis.set_title(f"What a rank fetches at {length:,} tokens", fontsize=10)
    axis.legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.0))


def recalls(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Share of the oracle's pages, weighted by what they get, that an estimator keeps as well."""
    rows = [row for row in rows if row["estimators"]]
    kept = {
        name: statistics.fmean(row["estimators"][name]["share_recall"] for row in rows)
        for name in rows[0]["estimators"]
    }
    names = sorted(kept, key=kept.__getitem__)
    colours = ["#3182bd" if "sketch" in n else "#bdbdbd" for n in names]
    colours = ["#252525" if "oracle" in n else c for n, c in zip(names, colours, strict=True)]
    axis.barh(names, [kept[name] for name in names], color=colours)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlim(min(kept.values()) - 0.05, 1.0)
    axis.set_xlabel("kept of what the oracle's pages get (largest share)")
    axis.set_title("Estimators at 15% of the pages", fontsize=10)


def answers(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Right answers with prompt and answer both sparse, by setup; a mark for each task, length."""
    strict = [row for row in rows if row["decode"] == "sparse"]
    names: dict[str, list[float]] = {}
    for row in strict:
        names.setdefault(row["estimator"], []).append(row["right"] / row["asked"])
    ordered = sorted(names, key=lambda name: statistics.fmean(names[name]))
    for place, name in enumerate(ordered):
        axis.plot(names[name], [place] * len(names[name]), "o", alpha=0.4, color="#3182bd")
        axis.plot(statistics.fmean(names[name]), place, "|", color="black", markersize=12)
    axis.set_yticks(range(len(ordered)), ordered, fontsize=7)
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel("share right: a dot a task and length, bar the mean", fontsize=8)
    axis.set_title("Prompt and answer both sparse", fontsize=10)


if __name__ == "__main__":
    main()

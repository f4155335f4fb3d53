"""Draw docs/communication.png from benchmark/results/communication.json.

python benchmark/plot_communication.py [RESULT.json] [PICTURE.png]
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
LINES = {
    ("tp", ""): ("TP, two all-reduces", "#7f7f7f", "-"),
    ("pass_q", "zigzag"): ("pass-Q, zigzag", "#9467bd", "-"),
    ("pass_kv", "zigzag"): ("pass-KV, zigzag", "#1f77b4", "-"),
    ("pass_kv", "contiguous"): ("pass-KV, contiguous", "#1f77b4", "--"),
    ("ulysses", ""): ("Ulysses", "#2ca02c", "-"),
    ("stride", ""): ("stride CSA, s = 4", "#ff7f0e", "-"),
    ("block", "zigzag"): ("block CSA, zigzag", "#d62728", "-"),
    ("block", "contiguous"): ("block CSA, contiguous", "#d62728", "--"),
}
Row = dict[str, Any]


def main() -> None:
    names = sys.argv[1:]
    source = Path(names[0]) if names else ROOT / "benchmark/results/communication.json"
    target = Path(names[1]) if len(names) > 1 else ROOT / "docs/communication.png"
    result = json.loads(source.read_text())
    rows = [row for row in result["raw"] if "skipped" not in row and row["shape"] == "gqa8"]
    longest = max(row["tokens"] for row in rows)
    picture, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=130)
    curves(axes[0], [row for row in rows if row["tokens"] == longest], "ranks")
    axes[0].set_title(f"{longest:,} tokens")
    axes[0].set_xlabel("ranks")
    curves(axes[1], [row for row in rows if row["ranks"] == 8], "tokens")
    axes[1].set_title("8 ranks")
    axes[1].set_xlabel("tokens of the prompt")
    axes[1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylabel("bytes per token and layer, all ranks")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    note = f"gqa8: 32 query, 8 KV heads of 64, bf16; commit {result['commit']}"
    picture.text(0.99, 0.01, note, ha="right", fontsize=6)
    picture.tight_layout()
    picture.savefig(target)


def curves(axis: Axes, rows: list[Row], over: str) -> None:
    """A line a strategy, its mean over documents."""
    for (strategy, placement), (label, colour, line) in LINES.items():
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["strategy"] == strategy and row["placement"] == placement:
                found.setdefault(row[over], []).append(row["bytes"])
        xs = sorted(found)
        ys = [statistics.fmean(found[x]) for x in xs]
        axis.plot(xs, ys, line, marker="o", markersize=3, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row[over] for row in rows}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")


if __name__ == "__main__":
    main()

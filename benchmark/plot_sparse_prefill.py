"""Draw docs/sparse_prefill.png from benchmark/results/sparse_prefill.json.

Seconds to the first token, exact beside csa at a tenth of the pages.

    python benchmark/plot_sparse_prefill.py [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness import ROOT

WAYS = {"exact": ("exact", "#9ecae1"), "csa_10": ("csa, budget 10%", "#3182bd")}
WIDTH = 0.36


def draw(result: dict, target: Path) -> None:
    """A pair of bars for each length, the seconds on top and what csa gains."""
    figures = result["figures"]
    lengths = sorted({row["length"] for row in result["raw"]})
    picture, axes = plt.subplots(figsize=(7.2, 4))
    for shift, (way, (label, colour)) in enumerate(WAYS.items()):
        seconds = [figures[f"ttft_s_{way}_sp2_{length}"] for length in lengths]
        places = [at + (shift - 0.5) * WIDTH for at in range(len(lengths))]
        axes.bar(places, seconds, WIDTH, label=label, color=colour)
        for place, length, value in zip(places, lengths, seconds, strict=True):
            gain = figures.get(f"ttft_ratio_exact_over_{way}_sp2_{length}")
            text = f"{value:.0f} s" + (f"\n{gain:.1f}x" if gain else "")
            axes.annotate(text, (place, value), ha="center", va="bottom")
    axes.set_xticks(range(len(lengths)), [f"{length:,} tokens" for length in lengths])
    axes.set_ylabel("time to first token (s)")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    axes.set_title("0.5B shape, bf16, two ranks of one thread, over HTTP", fontsize=10)
    picture.tight_layout()
    picture.savefig(target, dpi=130)


def main() -> None:
    names = sys.argv[1:]
    source = Path(names[0]) if names else ROOT / "benchmark" / "results" / "sparse_prefill.json"
    target = Path(names[1]) if len(names) > 1 else ROOT / "docs" / "sparse_prefill.png"
    draw(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main()

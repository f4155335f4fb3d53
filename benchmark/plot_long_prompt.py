"""Draw docs/ttft.png from benchmark/results/long_prompt_sp.json: TTFT against SP degree.

python benchmark/plot_long_prompt.py [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
DEGREES = (1, 2)
COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")


def main() -> None:
    names = sys.argv[1:]
    source = Path(names[0]) if names else ROOT / "benchmark" / "results" / "long_prompt_sp.json"
    target = Path(names[1]) if len(names) > 1 else ROOT / "docs" / "ttft.png"
    result = json.loads(source.read_text())
    figures = result["figures"]
    prefix = "ttft_s_0_5b_sp1_"
    found = [name.removeprefix(prefix) for name in figures if name.startswith(prefix)]
    lengths = sorted(int(length) for length in found if length.isdigit())
    picture, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    width = 0.8 / len(lengths)
    for index, length in enumerate(lengths):
        colour = COLOURS[index % len(COLOURS)]
        times = [figures[f"ttft_s_0_5b_sp{degree}_{length}"] for degree in DEGREES]
        at = [degree + (index - (len(lengths) - 1) / 2) * width for degree in DEGREES]
        bars = axes.bar(at, times, width * 0.92, color=colour, label=f"{length:,} tokens")
        ratio = figures[f"ttft_ratio_0_5b_sp1_over_sp2_{length}"]
        labels = [f"{times[0]:.2f} s", f"{times[1]:.2f} s\n{ratio:.2f}x"]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 2)
    axes.set_xticks(DEGREES, [f"SP degree {degree}" for degree in DEGREES])
    axes.set_ylabel("time to first token (s)")
    axes.set_title("0.5B shape, bf16, exact; one thread per rank, over HTTP", fontsize=10)
    axes.legend(title="prompt", fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    machine = f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    picture.text(0.99, 0.01, f"{machine}, commit {result['commit']}", ha="right", fontsize=6)
    picture.tight_layout()
    picture.savefig(target)


if __name__ == "__main__":
    main()

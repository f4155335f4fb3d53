"""Draw steps of a timeline (``--trace-file``): what each rank did when.

python benchmark/plot_timeline.py TRACE.json PICTURE.png [--phase prefill] [--step -1] [--layers 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from step_profile import Span, read_events, steps

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

COLOURS = {
    "linear": "#3182bd",
    "attention": "#e6550d",
    "merge": "#fdae6b",
    "exchange": "#31a354",
    "wait": "#bdbdbd",
    "replay": "#756bb1",
    "rest": "#9ecae1",
}


def kind(name: str) -> str:
    """The colour that a span has."""
    return next((known for known in COLOURS if name.startswith(known)), "rest")


def draw(found: dict[int, Span], window_ms: float, title: str, target: Path) -> None:
    """One row a rank, from the first rank's first compute span on."""
    begin = min(step.begin for step in found.values())
    picture, axes = pyplot.subplots(figsize=(10, 0.9 + 0.7 * len(found)), dpi=150)
    for rank, step in found.items():
        for span in step.walk():
            at, took = (span.begin - begin) / 1e3, (span.end - span.begin) / 1e3
            if not span.inside and at < window_ms:
                colour = COLOURS[kind(span.name)]
                axes.barh(rank, took, left=at, height=0.7, color=colour, linewidth=0)
    axes.set_yticks(list(found), [f"rank {rank}" for rank in found])
    axes.set_xlim(0, window_ms)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of the step")
    axes.set_title(title, fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=handles, ncols=len(handles), fontsize=7, frameon=False, loc="upper center",
                bbox_to_anchor=(0.5, -0.35))  # fmt: skip
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    picture.savefig(target, bbox_inches="tight")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("trace", type=Path)
    options.add_argument("picture", type=Path)
    options.add_argument("--phase", default="prefill", choices=["prefill", "decode", "mixed"])
    options.add_argument("--step", type=int, default=-1, help="which of them, of the last rank")
    options.add_argument("--milliseconds", type=float, help="from the step's begin; all of it")
    args = options.parse_args()
    events = read_events(args.trace)
    ranks = sorted({event["pid"] for event in events if event.get("cat") == "step"})
    found = {rank: steps(events, rank, args.phase)[args.step] for rank in ranks}
    longest = max((step.end - step.begin) / 1e3 for step in found.values())
    draw(found, args.milliseconds or longest, f"a {args.phase} step", args.picture)


if __name__ == "__main__":
    main()

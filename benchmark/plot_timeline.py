"""Draw steps of a timeline (``--trace-file``): what each rank did when.

A step whose blocks fly between hosts has a row for each block; green is where a block waits for a
message. The rank's own row has what all of them computed: its gaps are what was not hidden.

    python benchmark/plot_timeline.py TRACE.json PICTURE.png [--phase prefill] [--step -1]
        [--title TEXT] [--milliseconds N]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from step_profile import Events, Span, read_events, spans_of, steps

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

COLOURS = {
    "linear": "#3182bd",
    "attention": "#e6550d",
    "choose": "#756bb1",
    "merge": "#fdae6b",
    "exchange": "#31a354",
    "wait": "#bdbdbd",
    "replay": "#9e9ac8",
    "rest": "#9ecae1",
}


def kind(name: str) -> str:
    """The colour that a span has."""
    return next((known for known in COLOURS if name.startswith(known)), "rest")


@dataclass(frozen=True)
class Row:
    label: str
    spans: list[Span]


def rows_of(events: Events, rank: int, step: Span) -> list[Row]:
    """A rank's rows in one step: its own, and of a step in flight one for each block."""
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name" and event["pid"] == rank
    }
    inside = [span for span in step.walk() if not span.inside]
    threads = [thread for thread, name in names.items() if name.startswith("block-")]
    blocks = []
    for thread in sorted(threads, key=lambda thread: int(names[thread].split("-")[1])):
        mine = [
            span
            for span in spans_of(events, rank, thread)
            if step.begin <= span.begin and span.end <= step.end
        ]
        blocks += [Row(names[thread].replace("-", " "), mine)] if mine else []
    if blocks:
        inside = [span for span in inside if span.name != "forward"]
        inside += [span for row in blocks for span in row.spans if kind(span.name) != "exchange"]
    return [Row(f"rank {rank}", inside), *blocks]


def draw(rows: list[Row], begin: float, window_ms: float, title: str, target: Path) -> None:
    """From the first rank's first span on."""
    height = 0.9 + (0.7 if len(rows) < 8 else 0.24) * len(rows)
    picture, axes = pyplot.subplots(figsize=(10, height), dpi=130)
    for number, row in enumerate(rows):
        for span in row.spans:
            at, took = (span.begin - begin) / 1e3, (span.end - span.begin) / 1e3
            if at < window_ms:
                colour = COLOURS[kind(span.name)]
                axes.barh(number, took, left=at, height=0.7, color=colour, linewidth=0)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set_xlim(0, window_ms)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of the step")
    axes.set_title(title, fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=handles, ncols=len(handles), fontsize=7, frameon=False, loc="upper center",
                bbox_to_anchor=(0.5, -0.45 / height))  # fmt: skip
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
    options.add_argument("--title", default="")
    args = options.parse_args()
    events = read_events(args.trace)
    ranks = sorted({event["pid"] for event in events if event.get("cat") == "step"})
    found = {rank: steps(events, rank, args.phase)[args.step] for rank in ranks}
    longest = max((step.end - step.begin) / 1e3 for step in found.values())
    rows = [row for rank, step in found.items() for row in rows_of(events, rank, step)]
    begin = min(step.begin for step in found.values())
    title = args.title or f"a {args.phase} step"
    draw(rows, begin, args.milliseconds or longest, title, args.picture)


if __name__ == "__main__":
    main()

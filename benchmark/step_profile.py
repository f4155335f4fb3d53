"""Where does a step's time go? The server's own timeline, summed by part.

A span's own time is its duration without the spans inside it; what no span names is Python between
calls. Replayed decode steps show their kernels' calls, products with their shape. The medians are
over the decode steps of one request, or the prefill steps of its prompt.

    python benchmark/step_profile.py --model DIR [--tokens 512] [--answer 64] [--sp 2] [--json FILE]
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Server, arguments, report

Events = list[dict[str, Any]]


@dataclass
class Span:
    """A node of the tree that nesting makes."""

    name: str
    begin: float
    end: float
    inside: list[Span] = field(default_factory=list)

    @property
    def own(self) -> float:
        return self.end - self.begin - sum(span.end - span.begin for span in self.inside)

    def walk(self) -> list[Span]:
        return [self, *(span for child in self.inside for span in child.walk())]


def read_events(path: str | Path) -> Events:
    """The events of a timeline, closed or not."""
    text = Path(path).read_text().rstrip().rstrip(",")
    events: Events = json.loads(text if text.endswith("]") else text + "]")
    return events


def spans_of(events: Events, rank: int, thread: int = 0) -> list[Span]:
    """The spans of one thread of a rank; 0 is the one that runs steps."""
    return [
        Span(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (rank, thread)
    ]


def steps(events: Events, rank: int, phase: str) -> list[Span]:
    """The steps of one rank with what happened inside each, in order."""
    spans = spans_of(events, rank)
    spans.sort(key=lambda span: (span.begin, -span.end))
    roots: list[Span] = []
    open_spans: list[Span] = []
    for span in spans:
        while open_spans and open_spans[-1].end < span.end:
            open_spans.pop()
        (open_spans[-1].inside if open_spans else roots).append(span)
        open_spans.append(span)
    return [root for root in roots if root.name == phase]


def table(found: list[Span]) -> dict[str, tuple[float, float]]:
    """Part -> (calls, own milliseconds) of a step, medians; dearest first, all of it at the end."""
    calls: dict[str, list[int]] = defaultdict(lambda: [0] * len(found))
    own: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(found))
    for index, step in enumerate(found):
        for span in step.walk():
            name = f"python in {span.name}" if span.inside else span.name
            calls[name][index] += 1
            own[name][index] += span.own / 1e3
    rows = {name: (statistics.median(calls[name]), statistics.median(own[name])) for name in own}
    ordered = dict(sorted(rows.items(), key=lambda row: -row[1][1]))
    total = statistics.median([(step.end - step.begin) / 1e3 for step in found])
    return {**ordered, "step": (1.0, total)}


def profile(flags: list[str], tokens: int, answer: int) -> Events:
    """The timeline of one request to a server of its own, after a short one."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with Server(*flags, "--trace-file", file.name) as server:
            draw = random.Random(tokens)
            for count, new in ((64, 4), (tokens, answer)):
                server.stream([draw.randrange(100, 30_000) for _ in range(count)], new)
        return read_events(file.name)


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--model", required=True)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--answer", type=int, default=64)
    options.add_argument("--sp", type=int, default=2)
    options.add_argument("flags", nargs="*", help="more flags of the server, after --")
    args = options.parse_args()
    flags = ["--model-path", args.model, "--sp-size", str(args.sp), *args.flags]
    if args.quick:
        args.tokens, args.answer = 128, 16
    events = profile(flags, args.tokens, args.answer)
    figures: dict[str, float] = {}
    for phase in ("prefill", "decode"):
        found = steps(events, 0, phase)
        rows = table(found[-args.answer // 2 :] if phase == "decode" else found[-1:])
        print(f"\n{phase}, rank 0 of {args.sp}\n{'part':34}{'calls':>8}{'ms':>10}{'share':>8}")
        for name, (calls, ms) in rows.items():
            print(f"{name:34}{calls:8.0f}{ms:10.2f}{ms / rows['step'][1]:8.1%}")
            figures[f"{phase}_ms_{name.replace(' ', '_')}"] = round(ms, 3)
    print()
    report(args.json, figures, {"flags": flags})


if __name__ == "__main__":
    main()

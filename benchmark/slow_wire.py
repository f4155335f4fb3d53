"""Two hosts and a slow wire between them: which strategy answers first, and what does the pipeline
hide?

Two network namespaces joined by a veth pair, each end shaped by ``tc tbf`` (root is needed), a rank
with one thread in each. The shape is `gqa8` with fewer layers where a run would be long
(`slow_wire_cells.py`): seconds per layer are what compares, and figures of all 8 layers are
extrapolated linearly from fewer and called so (`slow_wire_figures.py`).

    python benchmark/slow_wire.py [--quick] [--cells TEXT] [--resume] [--seconds 100]
        [--trace-file FILE] [--json FILE]

All cells take about half an hour. With --resume and --seconds each call measures some of those that
are left, for about so long.

Connections use reno: bbr takes acknowledgements that wait behind data of the other direction, in a
queue like this one's, for a slow wire, and sends a fifth less.

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import ROOT, arguments, commit, machine
from slow_wire_cells import Cell, cells
from slow_wire_figures import figures
from sps_runtime.telemetry import timeline

sys.path.insert(0, str(ROOT))
from test.kit.hosts import ADDRESSES, TwoHosts, available

START_S = 12.0
"""About what two ranks need to be ready."""


class Ranks:
    """Two rank processes on two hosts, as a context manager."""

    def __init__(self, hosts: TwoHosts, layers: int, tokens: int, trace: str = "") -> None:
        self._hosts = hosts
        self._told = (",".join(ADDRESSES), str(layers), str(tokens), trace)

    def __enter__(self) -> Ranks:
        program = str(ROOT / "benchmark" / "slow_wire_rank.py")
        self._hosts.shape(0)
        self._running = [
            self._hosts.start(host, sys.executable, program, str(host), *self._told, piped=True)
            for host in (0, 1)
        ]
        for process in self._running:
            _read(process)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._running:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._running:
            process.wait(30)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Seconds from the first rank's start to the last one's end, and what crossed."""
        self._hosts.shape(cell.mbit)
        line = json.dumps(asdict(cell.ask())).encode() + b"\n"
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        sides = [_read(process) for process in self._running]
        wire = self._hosts.wire_bytes() if cell.mbit else (0, 0)
        self._hosts.shape(0)
        began, ended = min(s.pop("began") for s in sides), max(s.pop("ended") for s in sides)
        return {"ttft_s": ended - began, "wire_bytes": wire, "ranks": sides}


def _read(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a rank ended with status {process.wait()}")
    return dict(json.loads(line))


def run(left: list[Cell], done: dict[str, Any], keep: Path | None, trace: str) -> None:
    """Measure cells, and write them to `done`."""
    with tempfile.TemporaryDirectory() as folder, TwoHosts(Path(folder)) as hosts:
        hosts.congestion_control("reno")
        for layers, together in itertools.groupby(left, lambda cell: cell.layers):
            mine = list(together)
            with Ranks(hosts, layers, max(cell.tokens for cell in mine), trace) as ranks:
                for cell in mine:
                    row = {**asdict(cell), "layers": layers, **ranks.measure(cell)}
                    done[cell.name] = row
                    print(f"{cell.name:40}{row['ttft_s']:9.3f} s, {layers} layers", flush=True)
                    save(keep, done)


def fitting(left: list[Cell], seconds: float) -> list[Cell]:
    """The first that fit into so many seconds, ranks' start and all; one at least."""
    found: list[Cell] = []
    for cell in left:
        started = START_S * (not found or found[-1].layers != cell.layers)
        seconds -= cell.about_s() + started
        if found and seconds < 0:
            break
        found.append(cell)
    return found


def save(path: Path | None, done: dict[str, Any]) -> None:
    if path:
        result = {"machine": machine(), "commit": commit(), "figures": figures(done), "raw": done}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--cells", default="", help="only those whose name holds this; a,b: any")
    options.add_argument("--resume", action="store_true", help="measure what --json lacks")
    options.add_argument("--seconds", type=float, default=1e9, help="stop after about so many")
    options.add_argument("--longest", type=float, default=100.0, help="leave out longer runs")
    options.add_argument("--trace-file", default="", help="a timeline of both ranks")
    args: argparse.Namespace = options.parse_args()
    why_not = available()
    if why_not:
        raise SystemExit(why_not)
    done: dict[str, Any] = {}
    if args.resume and args.json and args.json.exists():
        done = json.loads(args.json.read_text())["raw"]
    texts = args.cells.split(",")
    wanted = [c for c in cells(args.quick) if any(_matches(c.name, text) for text in texts)]
    left = [cell for cell in wanted if cell.name not in done]
    for cell in left:
        if cell.about_s() > args.longest:
            print(f"{cell.name:40} left out: about {cell.about_s():.0f} s")
    left = [cell for cell in left if cell.about_s() <= args.longest]
    now = fitting(left, args.seconds)
    if now:
        _traced(args.trace_file, lambda: run(now, done, args.json, args.trace_file))
    for name, value in figures(done).items():
        print(f"{name:60}  {value:.4g}")
    print(f"{len(left) - len(now)} cells are left")


def _traced(path: str, work: Callable[[], None]) -> None:
    if path:
        timeline.create(path)
    work()
    if path:
        timeline.finish(path)


def _matches(name: str, text: str) -> bool:
    """All parts of `text` (joined by +) occur."""
    return all(part in name for part in text.split("+"))


if __name__ == "__main__":
    main()

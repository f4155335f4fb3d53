"""Two hosts and a slow wire between them: which strategy answers first, and what does the pipeline
hide?

Two network namespaces joined by a veth pair, each end shaped by ``tc tbf`` (root is needed), a rank
with one thread in each. The shape is `gqa8` with fewer layers where a run would be long: seconds
per layer are what compares, and figures of all 8 layers are extrapolated linearly and called so.

    python benchmark/slow_wire.py [--quick] [--cells TEXT] [--resume] [--json FILE]

Connections use reno: bbr takes acknowledgements that wait behind data of the other direction, in a
queue like this one's, for a slow wire, and sends a fifth less.

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import ROOT, arguments, commit, machine
from slow_wire_rank import Prefill

sys.path.insert(0, str(ROOT))
from test.kit.hosts import ADDRESSES, TwoHosts, available

LAYERS = 8
RUN_LAYERS = {2048: 2, 8192: 2, 16384: 2, 32768: 1}
"""Layers that a run of a length has."""
RATES = {8192: (340.0, 100.0, 34.0, 10.0), 16384: (340.0, 34.0), 32768: (340.0, 34.0, 5.0)}
"""Megabits a second of each end; at 5, exact strategies communicate three times longer than they
compute 32k tokens."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "tp": {"world": "tp"},
    "pass_kv": {"strategy": "pass_kv"},
    "ulysses": {"strategy": "ulysses"},
    "stride_csa": {"sparse": {"estimator": "stride"}},
    "block_csa": {"sparse": {}},
}


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        mbit: of each end; 0 for an unlimited wire.
    """

    strategy: str
    pipeline: bool
    tokens: int
    mbit: float

    @property
    def name(self) -> str:
        wire = f"{self.mbit:g}mbit" if self.mbit else "free"
        return f"{self.strategy}{'' if self.pipeline else '_sequential'}_{self.tokens}_{wire}"

    @property
    def layers(self) -> int:
        """Of a run; one is enough where nothing flies from one to the next."""
        return 1 if self.strategy == "tp" else RUN_LAYERS[self.tokens]

    def ask(self) -> Prefill:
        return Prefill(self.tokens, pipeline=self.pipeline, **STRATEGIES[self.strategy])


class Ranks:
    """Two rank processes on two hosts, as a context manager."""

    def __init__(self, hosts: TwoHosts, layers: int, tokens: int) -> None:
        self._hosts = hosts
        self._told = (",".join(ADDRESSES), str(layers), str(tokens))

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


def cells(quick: bool) -> Iterator[Cell]:
    """All cells, those of a length together."""
    rates = {2048: (34.0,)} if quick else RATES
    for tokens in rates:
        for mbit in (0.0, *rates[tokens]):
            for strategy in STRATEGIES:
                pipelined = (False,) if strategy == "tp" or not mbit else (False, True)
                yield from (Cell(strategy, on, tokens, mbit) for on in pipelined)


def run(wanted: list[Cell], done: dict[str, Any], keep: Path | None) -> None:
    """Measure what is not in `done` yet, and write it there."""
    left = [cell for cell in wanted if cell.name not in done]
    with tempfile.TemporaryDirectory() as folder, TwoHosts(Path(folder)) as hosts:
        hosts.congestion_control("reno")
        for layers in sorted({cell.layers for cell in left}):
            mine = [cell for cell in left if cell.layers == layers]
            with Ranks(hosts, layers, max(cell.tokens for cell in mine)) as ranks:
                for cell in mine:
                    row = {**asdict(cell), "layers": layers, **ranks.measure(cell)}
                    done[cell.name] = row
                    print(f"{cell.name:40}{row['ttft_s']:9.3f} s", flush=True)
                    save(keep, done)


def save(path: Path | None, done: dict[str, Any]) -> None:
    if path:
        result = {"machine": machine(), "commit": commit(), "figures": figures(done), "raw": done}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Seconds a layer, the same times 8, and what of what could be hidden the pipeline hid."""
    found: dict[str, float] = {}
    for name, row in done.items():
        found[f"ttft_s_per_layer_{name}"] = row["ttft_s"] / row["layers"]
        found[f"ttft_s_extrapolated_8_layers_{name}"] = row["ttft_s"] / row["layers"] * LAYERS
    for name, row in done.items():
        together = done.get(name.replace("_sequential", ""))
        if row["mbit"] and not row["pipeline"] and together and together is not row:
            found |= _hidden(row, together, done)
    return found


def _hidden(row: dict[str, Any], pipelined: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
    alone = Cell(row["strategy"], False, row["tokens"], 0.0)
    if alone.name not in done:
        return {}
    comp = done[alone.name]["ttft_s"]
    comm = max(row["wire_bytes"]) * 8e-6 / row["mbit"]
    name = Cell(row["strategy"], True, row["tokens"], row["mbit"]).name
    hideable = row["ttft_s"] - max(comp, comm)
    return {
        f"comm_s_per_layer_{name}": comm / row["layers"],
        f"comp_s_per_layer_{name}": comp / row["layers"],
        f"sequential_over_sum_{name}": row["ttft_s"] / (comp + comm),
        f"hidden_share_{name}": (row["ttft_s"] - pipelined["ttft_s"]) / hideable,
    }


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--cells", default="", help="only those whose name holds this; a,b: any")
    options.add_argument("--resume", action="store_true", help="measure what --json lacks")
    args: argparse.Namespace = options.parse_args()
    why_not = available()
    if why_not:
        raise SystemExit(why_not)
    done: dict[str, Any] = {}
    if args.resume and args.json and args.json.exists():
        done = json.loads(args.json.read_text())["raw"]
    texts = args.cells.split(",")
    wanted = [c for c in cells(args.quick) if any(_matches(c.name, text) for text in texts)]
    run(wanted, done, args.json)
    for name, value in figures(done).items():
        print(f"{name:60}  {value:.4g}")


def _matches(name: str, text: str) -> bool:
    """All parts of `text` (joined by +) occur."""
    return all(part in name for part in text.split("+"))


if __name__ == "__main__":
    main()

"""Run pairs A B B A, keep every row as it is measured, go on where a run was cut off."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.cells import Cell, Pair
from peers.engines import Engine, cpu_seconds, start, watched
from peers.floors import measure
from peers.maths import Floor, decode_rate
from peers.protocol import PeerError

ORDER = (("ours", 0), ("other", 0), ("other", 1), ("ours", 1))
"""(side, repetition): both sides of a repetition get the same tokens, next to one another."""
Row = dict[str, Any]


@dataclass
class Store:
    """The rows of a run, on disk after every one of them."""

    path: Path | None
    head: Row
    rows: list[Row] = field(default_factory=list)

    def load(self) -> None:
        """Take over the rows of an earlier, cut off run; what failed there is tried again."""
        if self.path and self.path.exists():
            rows = json.loads(self.path.read_text())["raw"]
            self.rows = [row for row in rows if row["kind"] != "skipped"]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save({})

    def save(self, figures: dict[str, float]) -> None:
        if not self.path:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        whole = {**self.head, "figures": figures, "raw": self.rows}
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.rename(self.path)

    def of(self, kind: str, pair: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind and row["pair"] == pair]

    def left(self, pair: Pair, cells: Sequence[Cell]) -> list[Cell]:
        """The cells of a pair that are still to be measured."""
        done = {row["cell"] for row in self.of("cell", pair.name)}
        return [cell for cell in cells if cell.name not in done]


def run_cell(cell: Cell, ours: Engine, other: Engine) -> list[Row]:
    """Four runs of one cell; who is not asked is paused (ours sleeps)."""
    engines = {"ours": ours, "other": other}
    rows = []
    for side, repetition in ORDER:
        idle = engines["other" if side == "ours" else "ours"]
        idle.pause()
        before = cpu_seconds(idle.pid)
        times = engines[side].generate(cell.prompts(repetition), cell.new_tokens)
        if any(len(row) != cell.new_tokens for row in times):
            raise PeerError(f"{side} gave {[len(row) for row in times]} tokens")
        rows.append(
            {
                "side": side,
                "repetition": repetition,
                "ttft_s": max(row[0] for row in times),
                "decode_tokens_per_s": decode_rate(times),
                "other_cpu_s": cpu_seconds(idle.pid) - before,
            }
        )
    return rows


def run_pair(
    pair: Pair,
    cells: Sequence[Cell],
    starts: Callable[[Any], Engine],
    store: Store,
    probe: Callable[[int], Floor] = measure,
    watched_tokens: int = 4096,
) -> None:
    """Measure what is left of a pair; a side that cannot run is recorded, with its reason."""
    left = store.left(pair, cells)
    if not left:
        return
    threads = pair.ours.threads

    def floor() -> None:
        store.add({"kind": "floor", "pair": pair.name, **asdict(probe(threads))})

    floor()
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, side in (("other", pair.other), ("ours", pair.ours)):
            try:
                engine = starts(side)
                stack.callback(engine.close)
                store.add(warm(pair, name, engine, watched_tokens))
            except PeerError as error:
                store.add({"kind": "skipped", "pair": pair.name, "side": name, "why": str(error)})
                return
            engines[name] = engine
            engine.pause()
        for cell in left:
            try:
                rows = run_cell(cell, engines["ours"], engines["other"])
            except PeerError as error:
                why = f"{cell.name}: {error}"
                store.add({"kind": "skipped", "pair": pair.name, "side": "cell", "why": why})
                break
            store.add({"kind": "cell", "pair": pair.name, "cell": cell.name, "rows": rows})
    floor()


def warm(pair: Pair, name: str, engine: Engine, tokens: int) -> Row:
    """One untimed long prompt, memory watched, and a short one; what starting took."""
    row: Row = {
        "kind": "start",
        "pair": pair.name,
        "side": name,
        "api": engine.api,
        "versions": engine.versions,
        "cold_start_s": engine.cold_start_s,
    }
    tokens = min(tokens, max(cell.length for cell in pair.cells))
    with watched(engine, row):
        engine.generate(Cell(1, tokens, 4).prompts(-1), 4)
    engine.generate(Cell(1, 512, 4).prompts(-1), 4)
    return row


def starter(pair: Pair, model: Path, environments: Path) -> Callable[[Any], Engine]:
    return lambda side: start(side, pair, model, environments)

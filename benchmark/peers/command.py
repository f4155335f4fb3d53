"""The command line of `benchmark/peers.py`."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness import ROOT, arguments, commit, machine
from peers import table
from peers.cells import IMPORTANT, MODEL, PAIRS, QUICK_CELLS, Cell, Pair, estimate_s
from peers.floors import measure
from peers.install import RECIPES, install, installed
from peers.rounds import Store, run_pair, starter


def parser() -> argparse.ArgumentParser:
    told = arguments("How do we compare with other engines, side by side on this machine?")
    told.add_argument("--install", default="", help=f"first install these: {','.join(RECIPES)}")
    told.add_argument("--environments", type=Path, default=ROOT / "benchmark" / ".peers")
    told.add_argument(
        "--pairs", default="", help=f"of {','.join(PAIRS)} or 'all'; else {','.join(IMPORTANT)}"
    )
    told.add_argument("--cells", default="", help="only these, such as b1_512,b8_512")
    told.add_argument("--resume", action="store_true", help="measure what --json lacks")
    told.add_argument("--plan", action="store_true", help="print what would run and how long")
    return told


def chosen_pairs(names: str) -> list[Pair]:
    """Pairs by name. Raises SystemExit for an unknown one."""
    wanted = list(PAIRS) if names == "all" else names.split(",") if names else list(IMPORTANT)
    unknown = [name for name in wanted if name not in PAIRS]
    if unknown:
        raise SystemExit(f"no such pair: {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    return [PAIRS[name] for name in wanted]


def chosen_cells(pair: Pair, names: str, quick: bool) -> list[Cell]:
    if names:
        return [cell for cell in pair.cells if cell.name in names.split(",")]
    return list(QUICK_CELLS if quick else pair.cells)


def plan(work: Sequence[tuple[Pair, Sequence[Cell]]], store: Store) -> None:
    """Print the estimated seconds of every cell that is left, from floors measured now."""
    floors = {threads: measure(threads) for threads in {pair.ours.threads for pair, _ in work}}
    total = 0.0
    for pair, cells in work:
        left = store.left(pair, cells)
        seconds = {cell.name: estimate_s(pair, cell, floors[pair.ours.threads]) for cell in left}
        whole = sum(seconds.values()) + (pair.ready_s if left else 0.0)
        total += whole
        each = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        print(f"{pair.name:<16} {whole:5.0f} s: {each or 'all measured'}")
    print(f"{'total':<16} {total:5.0f} s")


def install_all(names: Sequence[str], environments: Path) -> None:
    """Install each; one that fails is told and does not stop the others."""
    for name in names:
        if name not in RECIPES:
            raise SystemExit(f"no recipe for {name}; there are {', '.join(RECIPES)}")
        try:
            install(name, environments / name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: not installed ({error})")
            continue
        print(f"{name}: installed")


def model_directory(environments: Path) -> Path:
    """The model that all engines read, written once."""
    from make_model import make_model

    path = environments / "models" / f"bench-{MODEL}"
    if not (path / "model.safetensors").exists():
        make_model(MODEL, path)
    return path


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    told = parser().parse_args()
    told.environments.mkdir(parents=True, exist_ok=True)
    if told.install:
        install_all(told.install.split(","), told.environments)
    pairs = chosen_pairs(told.pairs)
    if told.quick and not told.pairs:
        pairs = [p for p in pairs if installed(told.environments / p.other.peer)]
        pairs = [p for p in pairs if p.ready_s < 60.0]
    store = Store(told.json, {"machine": machine(), "commit": commit()})
    if told.resume:
        store.load()
    work = [(pair, chosen_cells(pair, told.cells, told.quick)) for pair in pairs]
    work = [(replace(pair, cells=tuple(cells)), cells) for pair, cells in work if cells]
    if told.plan:
        return plan(work, store)
    model = model_directory(told.environments)
    for pair, cells in work:
        run_pair(pair, cells, starter(pair, model, told.environments), store)
        print(table.markdown([pair], store), flush=True)
    measured = [replace(pair, cells=PAIRS[pair.name].cells) for pair, _ in work]
    store.save(table.figures(measured, store))
    if told.json:
        told.json.with_suffix(".md").write_text(table.markdown(measured, store))

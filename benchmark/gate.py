"""What the embedded model's attention asks of a sparse method: unions, estimators, tails, accuracy.

python benchmark/gate.py [--quick] [--json FILE] [--cells chain:4096 lookalike:16384 ...]

Rows of other cells that FILE already has are kept, so that long ones can be run one by one.
`docs/adr/0009-which-pages-a-query-block-reads.md` says what the figures decided.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gate_accuracy
import gate_measure as measure
import gate_unions as unions
from gate_capture import EmbeddedModel
from harness import arguments, commit, machine

Row = dict[str, Any]
MASSES = (0.90, 0.95, 0.99)
BUDGETS = (0.10, 0.15)
RANKS = (2, 4, 8)
BLOCK_PAGES = (1, 4, 16)
CELLS = [f"{task}:{n}" for n in (4096, 8192) for task in gate_accuracy.TASKS]


def layer_rows(layer: measure.Layer, basis: Tensor, samples: int) -> tuple[list[Row], Row]:
    """Figures by KV head, and those of estimators and tails over heads."""
    mean, largest = measure.true_shares(layer)
    known = measure.estimators(layer, basis)
    guessed = {
        name: measure.estimated_shares(layer, *known[name])
        for name in ("mean", "sketch 2 bits 4 rows")
    }
    rows = []
    for head in range(len(mean)):
        row = sets_row(mean[head], largest[head])
        for name, share in guessed.items():
            for budget in BUDGETS:
                sets = unions.budget_sets(share[head], budget)
                wide = unions.budget_sets(share[head], budget, 16)
                row[f"needles {name} budget {budget} Bq1024"] = unions.needles_kept(
                    wide, largest[head], 16
                )
                for ranks in RANKS:
                    u = unions.union_share(sets, ranks)
                    row[f"u {name} budget {budget} P{ranks}"] = u
                    u = unions.union_share(wide, ranks, 16)
                    row[f"u {name} budget {budget} Bq1024 P{ranks}"] = u
        rows.append({name: round(value, 3) for name, value in row.items()})
    return rows, compared(layer, known, samples)


def sets_row(mean: Tensor, largest: Tensor) -> Row:
    """Oracle sets of one KV head: density, union share, cheapest plan."""
    row: Row = {}
    for pages in BLOCK_PAGES:
        masses = MASSES if pages == 1 else ()
        named = {f"mass {m}": unions.mass_sets(mean, m, pages) for m in masses}
        named |= {f"budget {b}": unions.budget_sets(largest, b, pages) for b in BUDGETS}
        for name, sets in named.items():
            key = f"{name} Bq{pages * unions.PAGE}"
            row[f"density {key}"] = unions.density(sets, pages)
            held = (unions.pooled(mean, pages, False) * sets).sum(-1)
            row[f"needles {key}"] = unions.needles_kept(sets, largest, pages)
            row[f"held {key}"] = float(held.mean())
            for ranks in RANKS:
                row[f"u {key} P{ranks}"] = unions.union_share(sets, ranks, pages)
            if pages == 1 and name != "mass 0.9":
                for group in (2, 4):
                    row[f"cover G{group} {key} P8"] = unions.cover_share(sets, 8, group)
                if len(sets) <= 64:
                    row[f"min-cut G4 {key} P8"] = unions.cover_share(sets, 8, 4, exact=True)
    return row


def compared(layer: measure.Layer, known: Any, samples: int) -> Row:
    """Estimators and tails at a budget of 15% on evenly spaced query blocks."""
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tails: dict[str, list[float]] = defaultdict(list)
    last = layer.blocks - 1
    for i in range(samples):
        number = max(8, round(last * (i + 1) / samples))
        block = measure.truth(layer, number)
        for name, found in known.items():
            for _, figures in measure.judge(layer, block, found, 0.15):
                for figure, value in figures.items():
                    seen[name][figure].append(value)
        for kind, errors in measure.tails(layer, block, 0.15).items():
            tails[kind] += errors
    totals = ("needles", "needles_kept")
    return {
        "estimators": {
            name: {
                figure: round(sum(v) if figure in totals else statistics.fmean(v), 3)
                for figure, v in figures.items()
            }
            for name, figures in seen.items()
        },
        "tails": {kind: round(statistics.fmean(errors), 3) for kind, errors in tails.items()},
    }


def document_rows(
    model: EmbeddedModel, bases: list[Tensor], cell: str, options: argparse.Namespace
) -> Iterator[Row]:
    """One document, ``task:length``: a row for each of the layers asked for."""
    task, length = cell.split(":")
    captured = model.captured(task, int(length), max(options.layers) + 1, options.captures)
    for number in options.layers:
        layer = measure.layer_of(*captured[number], model.scale, bases[number])
        heads, rest = layer_rows(layer, bases[number], options.samples)
        where = {
            "task": task,
            "length": int(length),
            "layer": number,
            "tokens": len(captured[number][0]),
        }
        yield {**where, "heads": heads, **rest}


def summary(rows: list[Row], accuracy: list[Row]) -> dict[str, float]:
    """Means over documents of a length, over tasks, layers and heads."""
    figures: dict[str, float] = {}
    lengths = sorted({row["length"] for row in rows})
    for length in lengths:
        layers = [row for row in rows if row["length"] == length]
        heads = [head for layer in layers for head in layer["heads"]]
        for name in sorted(heads[0].keys() & heads[-1].keys()):
            figures[f"{name} {length}"] = statistics.fmean(h[name] for h in heads)
        compared = [layer for layer in layers if layer["estimators"]]
        for name in compared[0]["estimators"] if compared else ():
            cells = [layer["estimators"][name] for layer in compared]
            for figure in ("recall", "share_recall", "error_tail"):
                figures[f"{figure} {name} {length}"] = statistics.fmean(c[figure] for c in cells)
            needles = sum(c["needles"] for c in cells)
            found = sum(c["needles_kept"] for c in cells)
            figures[f"needle_recall {name} {length}"] = found / max(needles, 1)
        for kind in compared[0]["tails"] if compared else ():
            figures[f"tail_error {kind} {length}"] = statistics.fmean(
                layer["tails"][kind] for layer in compared
            )
    for row in accuracy:
        key = f"{row['estimator']} tail {row['tail']} {row['budget']} {row['decode']} decode"
        figures[f"right {row['task']} {row['length']} {key}"] = row["right"] / row["asked"]
    return {name.replace(" ", "_"): round(value, 3) for name, value in figures.items()}


def report(path: Path | None, figures: dict[str, float], raw: dict[str, list[Row]]) -> None:
    """Print the figures and write the result file, a row a line."""
    for name, value in figures.items():
        print(f"{name:<60}  {value:.4g}")
    if path:
        rows = {name: [json.dumps(row, separators=(",", ":")) for row in raw[name]] for name in raw}
        lists = ",\n".join(f'"{n}": [\n' + ",\n".join(r) + "\n]" for n, r in rows.items())
        head = {"machine": machine(), "commit": commit(), "figures": figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head)[:-1] + ',\n"raw": {\n' + lists + "\n}}\n")


def older(path: Path | None) -> dict[str, list[Row]]:
    if path and path.exists():
        raw = json.loads(path.read_text())["raw"]
        return {"layers": raw["layers"], "accuracy": raw["accuracy"]}
    return {"layers": [], "accuracy": []}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "")
    parser.add_argument("--cells", nargs="*", default=CELLS, help="task:length to measure")
    parser.add_argument("--layers", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--answers", nargs="*", default=[], help="task:length to answer sparsely")
    parser.add_argument("--setups", nargs="*", help="names of gate_accuracy.SETUPS")
    parser.add_argument("--questions", type=int, default=10, help="of a document")
    parser.add_argument("--captures", type=Path, help="folder that keeps q, k, v between runs")
    parser.add_argument("--samples", type=int, default=12, help="query blocks for estimators, or 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = EmbeddedModel()
    calibration = model.prompts("multi", 2048, 1, "basis")[0]
    bases = [measure.key_basis(k) for _, k, _ in model.capture(calibration.prompt, model.layers)]
    if options.quick:
        options.cells, options.answers, options.samples = ["chain:2048"], ["chain:2048"], 4
        options.setups, options.questions = gate_accuracy.QUICK, 4
    raw = older(options.json)
    for cell in options.cells:
        for row in document_rows(model, bases, cell, options):
            replace(raw["layers"], row, ("task", "length", "layer"))
        report(options.json, summary(raw["layers"], raw["accuracy"]), raw)
    for cell in options.answers:
        task, length = cell.split(":")
        for row in gate_accuracy.answer(
            model, bases, task, int(length), options.setups, options.questions
        ):
            print(row, flush=True)
            keys = ("task", "length", "estimator", "tail", "budget", "decode")
            replace(raw["accuracy"], row, keys)
            report(options.json, summary(raw["layers"], raw["accuracy"]), raw)


def replace(rows: list[Row], row: Row, keys: tuple[str, ...]) -> None:
    """Put a row in the place of that with the same keys."""
    rows[:] = [old for old in rows if any(old[key] != row[key] for key in keys)] + [row]


if __name__ == "__main__":
    main()

"""The table of benchmark/results/accuracy.json, as docs have it.

python benchmark/accuracy_table.py [RESULT.json]

A task's column: right answers in percent, and how many points they lie below dense attention over
the same questions (below zero: above it). `worst` is the task that loses most, with the 95%
interval of its loss; `n` are the questions of the least and most asked task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accuracy_cases import TASKS
from accuracy_figures import by_cell, cell_figures, worst

Rows = list[dict[str, Any]]
RESULT = Path(__file__).resolve().parent / "results" / "accuracy.json"
COLUMNS = (
    "length",
    "place",
    "answer",
    "judge",
    "setup",
    *TASKS,
    "worst",
    "density",
    "bytes, P = 8",
)


def lines(rows: Rows) -> list[str]:
    """Markdown, a cell a line."""
    cells = by_cell(rows)
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for (length, place, decode, judge, name), mine in sorted(cells.items()):
        dense = cells.get((length, place, "sparse", judge, "dense"), [])
        values, differences = cell_figures(mine, dense)
        known = {} if mine is dense else differences
        tasks = [_task(values, known, task) for task in TASKS]
        sent = values.get("bytes_per_token_layer_p8")
        asked = [int(value) for what, value in values.items() if what.startswith("asked_")]
        fields = [length, place, decode, judge, name, f"{min(asked)}-{max(asked)}", *tasks]
        fields += [_worst(mine, dense, differences), f"{values['density']:.3f}"]
        table.append("| " + " | ".join(map(str, [*fields, f"{sent:.0f}" if sent else ""])) + " |")
    return table


def _task(values: dict[str, float], differences: dict[str, Any], task: str) -> str:
    if f"right_{task}" not in values:
        return ""
    share = f"{100 * values[f'right_{task}']:.1f}"
    return f"{share} ({0 - 100 * differences[task][0]:+.1f})" if task in differences else share


def _worst(mine: Rows, dense: Rows, differences: dict[str, Any]) -> str:
    known = None if mine is dense else worst(mine, dense, list(TASKS))
    if known is None:
        return ""
    _, low, high = (-100 * x for x in differences[known[0]])
    return f"{known[0]} {known[1]:+.1f} ({high:+.1f} to {low:+.1f})"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    print("\n".join(lines(json.loads(path.read_text())["raw"]["rows"])))


if __name__ == "__main__":
    main()

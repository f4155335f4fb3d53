"""From rows (document, setup, answers) to shares, differences from dense, worst tasks, bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import accuracy_stride as stride
from accuracy_cases import TASKS
from accuracy_setups import setup
from accuracy_statistics import paired, wilson

Row = dict[str, Any]
Cell = tuple[int, str, str, str, str]
"""(length, place, decode, judge, setup)."""
LAYERS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 64
PAGE_BYTES = 2 * PAGE * HEAD_DIM * 2


def summary_nbytes(name: str) -> int:
    """Bytes that say enough of a page and KV head for a setup to choose: what is sent to ranks that
    do not hold the page. Methods that sample keys need all of them."""
    chosen = setup(name)
    means = 2 * HEAD_DIM * 2 if chosen.settings.tail == "mean" else 0
    kinds = {
        "block": PAGE * HEAD_DIM * chosen.bits // 8 + 2 * HEAD_DIM * 2,
        "mean": HEAD_DIM * 2,
        "quest": 2 * HEAD_DIM * 2,
        "null": 0,
    }
    return means + kinds.get(chosen.estimator, PAGE_BYTES // 2)


def page_bytes(name: str) -> int:
    """Bytes of a chosen page; where its keys had to be sent anyway only its values are left."""
    sent = setup(name).estimator in ("oracle", "vertical_slash", "xattention")
    return PAGE_BYTES // 2 if sent else PAGE_BYTES


def bytes_per_token(row: Row, ranks: int) -> float:
    """Logical remote bytes of a token and layer: chosen pages, all pages' summaries, ids."""
    fetched, remote = row["unions"][str(ranks)]
    total = fetched * (page_bytes(row["setup"]) + 4) + remote * summary_nbytes(row["setup"])
    return float(total / (row["tokens"] * LAYERS))


def exact_bytes(ranks: int) -> float:
    """Pass-KV over contiguous shards: a token's K and V to every later rank."""
    return (ranks - 1) / 2 * 2 * KV_HEADS * HEAD_DIM * 2


def by_cell(rows: list[Row]) -> dict[Cell, list[Row]]:
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        cell = (row["length"], row["place"], row["decode"], row["judge"], row["setup"])
        cells[cell].append(row)
    return cells


def answers(rows: list[Row], task: str) -> dict[tuple[int, int], bool]:
    """(document, question) -> right."""
    return {
        (row["document"], number): bit == "1"
        for row in rows
        for number, bit in enumerate(row["answers"].get(task, ""))
    }


def compared(rows: list[Row], dense: list[Row], task: str) -> tuple[int, int, Any]:
    """(right, asked, paired difference from dense or None) of a task."""
    mine, theirs = answers(rows, task), answers(dense, task)
    both = sorted(mine.keys() & theirs.keys())
    difference = paired([mine[k] for k in both], [theirs[k] for k in both]) if both else None
    return sum(mine.values()), len(mine), difference


def cell_figures(rows: list[Row], dense: list[Row]) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of one cell, and its tasks: {task: (difference, low, high)} from dense."""
    found: dict[str, float] = {}
    differences: dict[str, Any] = {}
    for task in TASKS:
        right, asked, difference = compared(rows, dense, task)
        if not asked:
            continue
        found[f"right_{task}"] = right / asked
        found[f"asked_{task}"] = asked
        found[f"low95_{task}"], found[f"high95_{task}"] = wilson(right, asked)
        if difference:
            differences[task] = difference
            found[f"points_below_dense_{task}"] = -100 * difference[0]
            found[f"points_below_dense_at_most_{task}"] = -100 * difference[1]
    found["density"] = sum(row["density"] for row in rows) / len(rows)
    for ranks in (2, 4, 8):
        known = [row for row in rows if row["unions"].get(str(ranks), (0, 0))[1]]
        if known:
            each = [row["unions"][str(ranks)] for row in known]
            found[f"u_p{ranks}"] = sum(f for f, _ in each) / sum(r for _, r in each)
            sent = [bytes_per_token(row, ranks) for row in known]
            found[f"bytes_per_token_layer_p{ranks}"] = sum(sent) / len(sent)
    chosen = setup(rows[0]["setup"])
    if chosen.estimator == "stride":
        found[f"bytes_per_token_layer_p{chosen.ranks}"] = stride.bytes_per_token(chosen)
    if chosen.estimator == "dense":
        found |= {f"bytes_per_token_layer_p{p}": exact_bytes(p) for p in (2, 4, 8)}
    return found, differences


def figures(rows: list[Row]) -> dict[str, float]:
    """All cells' figures by name: what, task, length, place, decode, setup."""
    cells = by_cell(rows)
    found: dict[str, float] = {}
    for (length, place, decode, judge, name), mine in sorted(cells.items()):
        dense = cells.get((length, place, "sparse", judge, "dense"), [])
        values, _ = cell_figures(mine, dense)
        where = f"{length}_{place}_{decode}_{judge}_{name}"
        found |= {f"{what}_{where}": round(value, 5) for what, value in values.items()}
    return found


def counting(cells: dict[Cell, list[Row]], length: int, place: str, judge: str) -> list[str]:
    """Tasks that count: those where the null loses 10 points or more."""
    dense = cells.get((length, place, "sparse", judge, "dense"), [])
    null = cells.get((length, place, "sparse", judge, "null"), [])
    losses = {task: compared(null, dense, task)[2] for task in TASKS}
    return [task for task, loss in losses.items() if loss and loss[0] <= -0.10]


def worst(rows: list[Row], dense: list[Row], tasks: list[str]) -> tuple[str, float] | None:
    """The task that loses most, and its points below dense."""
    _, differences = cell_figures(rows, dense)
    known = {task: -100 * differences[task][0] for task in tasks if task in differences}
    return max(known.items(), key=lambda item: item[1]) if known else None

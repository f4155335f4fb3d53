"""What does a bound on dropped attention (`max_tau`) cost in bytes between hosts?

python benchmark/bound_bytes.py [--quick] [--json FILE] [--captures FOLDER]

The embedded model's own q, k and v of one document, each rank a host of its own (as threads), every
layer in one step by the runtime's block CSA: logical bytes of a token and layer, all ranks
together, by what they are. `pages` are those of choices, first, wider and all; `all pages` what
exact attention would fetch in the same places. docs/communication.md has the table.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from communication import shape_of
from communication_ranks import DTYPE, PAGE, Crossed, Prefill
from gate_capture import EmbeddedModel
from harness import arguments, report
from sps_runtime.attention.choose import choose_backend
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.sparse.audit import RECORD
from sps_runtime.sparse.dispatch import choose_operators
from sps_runtime.types.attention import AttentionSpec, SparseSettings

Row = dict[str, Any]
Layer = tuple[Tensor, Tensor, Tensor]
TASKS, TOKENS = ("chain",), 16384
BOUNDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.04)
"""Nothing is bounded, ..., no sample of 64 rows can show it."""


def captured(task: str, tokens: int, captures: Path | None) -> list[Layer]:
    """q, k, v of each layer over the beginning of a document."""
    model = EmbeddedModel()
    found = model.captured(task, round(tokens * 1.15), model.layers, captures)
    return [(q[:tokens].to(DTYPE), k[:tokens].to(DTYPE), v[:tokens].to(DTYPE)) for q, k, v in found]


def prefill(layers: list[Layer], ranks: int, settings: SparseSettings) -> list[Crossed]:
    """Every layer over ranks that are hosts of their own, placed as a server does then."""
    shape, ops = shape_of("embedded"), choose_ops("auto", 1)
    backend = choose_backend(ops, page_size=PAGE, head_dim=shape.head_dim)
    return [
        Prefill(
            shape,
            len(layer[0]),
            ranks,
            placement="contiguous",
            attention=AttentionSpec("csa", settings),
            operators=choose_operators(ops.kernels, 1),
            given=layer,
            backend=backend,
            apart=True,
        ).run()
        for layer in layers
    ]


def row(task: str, tokens: int, ranks: int, max_tau: float, crossed: list[Crossed]) -> Row:
    """Bytes of a token and layer, and what was read and dropped."""
    counters = [one for each in crossed for one in each.counters]
    unit = 2 * PAGE * shape_of("embedded").head_dim * DTYPE.itemsize / tokens / len(crossed)
    total = sum(one.attention for one in crossed) / tokens / len(crossed)
    pages = sum(one.fetched_units for one in counters) * unit
    taus = [record[3] for one in counters for record in RECORD.iter_unpack(one.audits)]
    return {
        "task": task,
        "tokens": tokens,
        "ranks": ranks,
        "max_tau": max_tau,
        "bytes": total,
        "pages": pages,
        "all_pages": sum(one.remote_units for one in counters) * unit,
        "rest": total - pages,
        "density": sum(c.read_pairs for c in counters) / sum(c.causal_pairs for c in counters),
        "fallbacks": sum(one.fallbacks for one in counters),
        "measured": len(taus),
        "tau_mean": sum(taus) / len(taus),
    }


def figures(rows: list[Row]) -> dict[str, float]:
    """Bytes by cell, and over all pages."""
    flat = {}
    for row in rows:
        cell = f"p{row['ranks']}_{row['tokens']}_{row['task']}_max_tau_{row['max_tau']}"
        flat[f"bytes_per_token_layer_{cell}"] = row["bytes"]
        flat[f"share_of_all_pages_{cell}"] = row["bytes"] / row["all_pages"]
        flat[f"fallback_share_{cell}"] = row["fallbacks"] / row["measured"]
    return flat


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--captures", type=Path, help="captured q, k and v are kept there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows, settings = [], SparseSettings().for_prompt(TOKENS)
    for task in TASKS:
        layers = captured(task, TOKENS, options.captures)
        for ranks, max_tau in itertools.product((2,) if options.quick else (2, 4, 8), BOUNDS):
            bounded = msgspec.structs.replace(settings, max_tau=max_tau)
            rows.append(row(task, TOKENS, ranks, max_tau, prefill(layers, ranks, bounded)))
    report(options.json, figures(rows), rows)


if __name__ == "__main__":
    main()

"""What does a bound on dropped attention (`max_tau`) cost in bytes between hosts?

python benchmark/bound_bytes.py [--quick] [--json FILE] [--captures FOLDER]

The embedded model's own q, k and v of one document, each rank a host of its own (as threads), every
layer in one step by the runtime's block CSA: logical bytes of a token and layer, all ranks
together, by what they are. `pages` are those of choices, first, wider and all; `all pages` what
exact attention would fetch in the same places. docs/communication.md has the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from communication import shape_of
from communication_ranks import DTYPE, PAGE, Prefill
from gate_capture import EmbeddedModel
from harness import arguments, report
from sps_runtime.attention.choose import choose_backend
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.sparse.audit import RECORD
from sps_runtime.sparse.dispatch import choose_operators
from sps_runtime.types.attention import AttentionSpec, SparseSettings

Row = dict[str, Any]
BOUNDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.04)


def rows_of(task: str, tokens: int, ranks: int, captures: Path | None) -> Iterator[Row]:
    """One row for each bound."""
    model, shape = EmbeddedModel(), shape_of("embedded")
    found = model.captured(task, round(tokens * 1.15), model.layers, captures)
    layers = [tuple(x[:tokens].to(DTYPE).contiguous() for x in qkv) for qkv in found]
    ops = choose_ops("auto", 1)
    backend = choose_backend(ops, page_size=PAGE, head_dim=shape.head_dim)
    settings = SparseSettings().for_prompt(tokens)
    for max_tau in BOUNDS:
        spec = AttentionSpec("csa", msgspec.structs.replace(settings, max_tau=max_tau))
        crossed = [
            Prefill(
                shape, tokens, ranks, attention=spec, operators=choose_operators(ops.kernels, 1),
                given=given, backend=backend, apart=True,
            ).run()
            for given in layers
        ]  # fmt: skip
        counters = [one for each in crossed for one in each.counters]
        unit = 2 * PAGE * shape.head_dim * DTYPE.itemsize
        each = tokens * len(layers)
        total = sum(one.attention for one in crossed) / each
        pages = sum(one.fetched_units for one in counters) * unit / each
        taus = [r[3] for one in counters for r in RECORD.iter_unpack(one.audits)]
        yield {
            "task": task,
            "tokens": tokens,
            "ranks": ranks,
            "max_tau": max_tau,
            "bytes": total,
            "pages": pages,
            "all_pages": sum(one.remote_units for one in counters) * unit / each,
            "rest": total - pages,
            "density": sum(c.read_pairs for c in counters) / sum(c.causal_pairs for c in counters),
            "fallbacks": sum(one.fallbacks for one in counters),
            "places": len(taus) if max_tau < 1 else 0,
            "tau_mean": sum(taus) / max(1, len(taus)),
        }


def figures(rows: list[Row]) -> dict[str, float]:
    """Bytes by cell, and over all pages."""
    flat = {}
    for row in rows:
        cell = f"p{row['ranks']}_{row['tokens']}_{row['task']}_max_tau_{row['max_tau']}"
        flat[f"bytes_per_token_layer_{cell}"] = row["bytes"]
        flat[f"share_of_all_pages_{cell}"] = row["bytes"] / row["all_pages"]
        flat[f"fallback_share_{cell}"] = row["fallbacks"] / max(1, row["places"])
    return flat


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--captures", type=Path, help="captured q, k and v are kept there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cells = itertools.product(("chain",), (16384,), (2,) if options.quick else (2, 4, 8))
    rows = [row for cell in cells for row in rows_of(*cell, options.captures)]
    report(options.json, figures(rows), rows)


if __name__ == "__main__":
    main()

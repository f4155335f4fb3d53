"""What does each step from tensor parallelism to block CSA gain, in seconds and in bytes?

Two hosts (`slow_wire.py`'s namespaces) and one wire, the `gqa8` shape: every rung changes one thing
of the rung before, all are measured in turns of one run, up the ladder and down again. Untrimmed
pass-KV and fetch-or-route are not run here: the first is no code of ours, the second is not used in
prefill (ADR 9). A rung of decode times a token behind the same prompt.

    python benchmark/ablation.py [--quick] [--tokens 16384] [--mbit 34] [--rounds 2]
        [--json FILE]

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import arguments, median, report
from slow_wire import Cell, Ranks, TwoHosts, available
from slow_wire_rank import Prefill

DECODED = 5
CHUNK = 2048

BLOCK: dict[str, Any] = {"placement": "contiguous", "sparse": {}}
RUNGS: dict[str, dict[str, Any]] = {
    "tp_chunked": {"world": "tp", "chunk": CHUNK},
    "exact_sp_zigzag": {"pipeline": False},
    "exact_sp_contiguous": {"pipeline": False, "placement": "contiguous"},
    "stride_csa": {**BLOCK, "pipeline": False, "sparse": {"estimator": "stride"}},
    "block_csa_no_tail": {**BLOCK, "pipeline": False, "sparse": {"tail": "none"}},
    "block_csa": {**BLOCK, "pipeline": False},
    "block_csa_pipelined": BLOCK,
}
DECODES: dict[str, dict[str, Any]] = {
    "decode_pulls_kv": {"decode_strategy": "pass_kv"},
    "decode_sends_queries": {"decode_strategy": "pass_q"},
    "decode_sends_queries_replicated": {"decode_placement": "replicated"},
}


@dataclass(frozen=True)
class Rung(Cell):
    """A cell with a name of its own."""

    label: str = ""

    def ask(self) -> Prefill:
        if self.label in RUNGS:
            return Prefill(self.tokens, **RUNGS[self.label])
        return Prefill(self.tokens, **BLOCK, decode=DECODED, **DECODES[self.label])


def climb(tokens: int, mbit: float, rounds: int) -> list[dict[str, Any]]:
    """Rows of all rungs, up and down."""
    rungs = [Rung("", True, tokens, mbit, label) for label in (*RUNGS, *DECODES)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, TwoHosts(Path(folder)) as hosts:
        hosts.congestion_control("reno")
        layers = 1 if tokens > 16384 else 2
        with Ranks(hosts, layers, tokens) as ranks:
            for rung in [*rungs, *reversed(rungs)][: len(rungs) * rounds]:
                row = {"rung": rung.label, "layers": layers, **ranks.measure(rung)}
                decode_s = max(rank["decode_s"] for rank in row["ranks"])
                print(f"{rung.label:34}{row['ttft_s']:9.3f} s{1e3 * decode_s:9.1f} ms", flush=True)
                rows.append(row)
    return rows


def figures_of(rows: list[dict[str, Any]], tokens: int) -> dict[str, float]:
    """Seconds and logical bytes a layer of each rung."""
    figures: dict[str, float] = {}
    for label in (*RUNGS, *DECODES):
        mine = [row for row in rows if row["rung"] == label]
        layers = mine[0]["layers"]
        if label in DECODES:
            times = [max(rank["decode_s"] for rank in row["ranks"]) for row in mine]
            figures[f"tbt_ms_per_layer_{label}"] = 1e3 * median(times) / layers
            continue
        sent = [sum(r["sent_bytes"] + r["linear_bytes"] for r in row["ranks"]) for row in mine]
        figures[f"ttft_s_per_layer_{label}"] = median([row["ttft_s"] for row in mine]) / layers
        figures[f"bytes_per_token_layer_{label}"] = median(sent) / layers / tokens
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--mbit", type=float, default=34.0, help="of each end of the wire")
    parser.add_argument("--rounds", type=int, default=2, help="1: up the ladder alone")
    args = parser.parse_args()
    if why_not := available():
        raise SystemExit(why_not)
    tokens = 4096 if args.quick else args.tokens
    rows = climb(tokens, args.mbit, 1 if args.quick else args.rounds)
    report(args.json, figures_of(rows, tokens), rows)


if __name__ == "__main__":
    main()

"""How long does it take from starting a server to the first token, and what memory does it hold?

The `0.5b` shape on two ranks of one thread, by bf16, int8 and int4 weights in turns: *cold* starts
find no packed weights and keep theirs, *warm* ones read what a cold one kept. The checkpoint is in
the page cache either way. Memory is the proportional set size of the whole process tree, its peak
during a prompt of 4,096 tokens of the last warm start.

    python benchmark/start_up.py [--quick] [--model DIR] [--rounds 3] [--json FILE]

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Server, arguments, median, report
from make_model import make_model

FORMS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--quantization", "int8"),
    "int4": ("--quantization", "int4"),
}
PROMPT, LONG = 16, 4096
KEPT_S = 60.0
"""Seconds in which a cold server has kept its packed weights."""


def start(form: str, model: Path, cache: Path, memory: bool) -> dict[str, Any]:
    """One start: seconds until the server is healthy, and until it has answered a token. It ends
    when packed weights are kept: the server writes them when it is idle."""
    flags = ["--model-path", str(model), "--sp-size", "2", "--threads-per-rank", "1"]
    draw = random.Random(form)
    with Server(*flags, *FORMS[form], "--weight-cache-dir", str(cache)) as server:
        server.stream([draw.randrange(100, 30_000) for _ in range(PROMPT)], 1)
        row: dict[str, Any] = {"first_token_s": time.perf_counter() - server.started}
        row["healthy_s"] = server.ready_s
        if memory:
            with server.watch_memory():
                server.stream([draw.randrange(100, 30_000) for _ in range(LONG)], 4)
            row["peak_pss_bytes"] = server.peak_pss_bytes
        deadline = time.monotonic() + KEPT_S
        while not any(cache.glob("*.weights")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no packed weights in {cache} after {KEPT_S:g} s")
            time.sleep(0.2)
    return row


def measure(model: Path, forms: list[str], rounds: int) -> list[dict[str, Any]]:
    """In every round each form starts cold once and warm once."""
    rows = []
    for number in range(rounds):
        for form in forms:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    last = kind == "warm" and number == rounds - 1
                    row = start(form, model, Path(cache), last)
                    rows.append({"form": form, "kind": kind, **row})
    return rows


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians by form and kind, the slowest start beside them, and peak memory."""
    figures: dict[str, float] = {}
    for form, kind in dict.fromkeys((row["form"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["form"], row["kind"]) == (form, kind)]
        for quantity in ("healthy_s", "first_token_s"):
            figures[f"{quantity}_{kind}_{form}"] = median([row[quantity] for row in mine])
        figures[f"first_token_s_slowest_{kind}_{form}"] = max(row["first_token_s"] for row in mine)
        for row in mine:
            if "peak_pss_bytes" in row:
                figures[f"peak_pss_gb_{form}"] = row["peak_pss_bytes"] / 1e9
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, help="a directory of the 0.5b shape")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    forms, rounds = (["bf16"], 1) if args.quick else (list(FORMS), args.rounds)
    with tempfile.TemporaryDirectory() as room:
        model = args.model or make_model("0.5b", room)
        rows = measure(model, forms, rounds)
    report(args.json, figures_of(rows), rows)


if __name__ == "__main__":
    main()

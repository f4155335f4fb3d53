"""What block-sparse attention saves of a long prompt's time to its first token, on one host.

The `0.5b` shape on two ranks, a thread each: exact attention beside csa with budgets of 10% and
12%, requests in turns (exact, 10%, 12%, 12%, 10%, exact), no prefix cache hit. The weights are
random and attend almost uniformly, so what csa reads is forced, in one of two ways:

- ``csa_10``: all of csa runs and is paid for (summaries, scores of all pages, choice, tail, merge);
  ``tau`` 0 lets the budget alone say how many pages each query block keeps, at least 16 a block.
- ``forced_10`` (``--forced``): page sets of exactly that density over the whole prompt, drawn at
  random for each superblock, the first page and the latest two among them. Nothing is scored:
  this is what page sets cost that are known for nothing. Summaries and tail are paid for.

Which pages are best says nothing about a trained model, and so nothing here is about answers. The
density that came out is the server's own report, over causal (query block, page, KV head).

Metrics are defined in benchmark/README.md.

    python benchmark/sparse_prefill.py [--lengths 8192 16384] [--rounds 1] [--forced] [--model DIR]
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

from harness import Server, arguments, best_floors, floors, median, report
from long_prompt import PAGE, flops
from make_model import SHAPES, make_model
from streams import Stream

MODEL = "0.5b"
LENGTHS = (8192, 16384, 32768, 65536)
QUICK = (6144,)
BUDGETS = (0.10, 0.12)
EXACT = "exact"
ALWAYS = 4
"""Pages that any block reads: the first, two before it, its own."""
WARM = 2048
"""Tokens of the untimed prompt before all others; csa may not pay for so few."""


def setups(budgets: tuple[float, ...], forced: bool, length: int) -> dict[str, dict[str, Any]]:
    """A request's ``attention`` by the name of what is measured."""
    names: dict[str, dict[str, Any]] = {EXACT: {"mode": "exact"}}
    for share in budgets:
        names[f"csa_{round(100 * share)}"] = {"mode": "csa", "tau": 0.0, "budget": share}
    for share in budgets if forced else ():
        budget = budget_of(share, length)
        sets = {"mode": "csa", "estimator": "random", "tau": 0.0, "budget": budget}
        names[f"forced_{round(100 * share)}"] = sets
    return names


def budget_of(density: float, tokens: int) -> float:
    """The budget whose page sets, of at least the pages that are always kept, come to a density
    over a prompt; as near as whole pages allow."""
    blocks = range(1, -(-tokens // PAGE) + 1)

    def read(budget: float) -> float:
        return sum(min(n, max(ALWAYS, ceil(budget * n))) for n in blocks) / sum(blocks)

    low, high = 0.001, density
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if read(middle) < density else (low, middle)
    return low


def ask(server: Server, ids: list[int], attention: dict[str, Any]) -> dict[str, Any]:
    """One fresh prompt, one token."""
    stream: Stream = server.stream(ids, 1, attention=attention, timeout=3600)
    return {"ttft_s": stream.ttft, "attention": stream.meta.get("attention")}


def measure(
    server: Server, lengths: tuple[int, ...], budgets: tuple[float, ...], forced: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """Rows of all lengths, each setup forwards and backwards; 0 rounds: forwards alone."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(300, 1000) for _ in range(length)]

    for attention in setups(budgets, forced, WARM).values():
        ask(server, prompt(WARM), attention)
    for length in lengths:
        names = setups(budgets, forced, length)
        for name in [*names, *reversed(names)] * rounds or names:
            row = ask(server, prompt(length), names[name])
            row |= {"setup": name, "length": length}
            print(f"{length} {name} {row['ttft_s']:.2f} s {density(row):.3f}", flush=True)
            yield row


def density(row: dict[str, Any]) -> float:
    """Of a row, as the server reports it."""
    return float((row["attention"] or {}).get("density", 1.0))


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians by setup and length, what csa gains over exact, and how alike repetitions are."""
    figures: dict[str, float] = {}
    for length in sorted({row["length"] for row in rows}):
        names = dict.fromkeys(row["setup"] for row in rows if row["length"] == length)
        found = {n: [r for r in rows if (r["setup"], r["length"]) == (n, length)] for n in names}
        times = {n: [r["ttft_s"] for r in there] for n, there in found.items()}
        for name, there in found.items():
            figures[f"ttft_s_{name}_sp2_{length}"] = median(times[name])
            figures[f"ttft_spread_{name}_sp2_{length}"] = max(times[name]) / min(times[name])
            if name != EXACT:
                gain = median(times[EXACT]) / median(times[name])
                figures[f"ttft_ratio_exact_over_{name}_sp2_{length}"] = gain
                figures[f"density_{name}_sp2_{length}"] = density(there[0])
        figures[f"exact_flops_{length}"] = flops(SHAPES[MODEL], length)
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompts")
    parser.add_argument("--rounds", type=int, default=1, help="turns of all setups; 0: no way back")
    parser.add_argument("--forced", action="store_true", help="page sets of exact density, too")
    parser.add_argument(
        "--model", type=Path, help="a directory of the 0.5b shape, else one is made"
    )
    args = parser.parse_args()
    lengths = tuple(args.lengths or (QUICK if args.quick else LENGTHS))
    budgets = BUDGETS[:1] if args.quick else BUDGETS
    before = floors(2)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / f"bench-{MODEL}"
        if args.model is None:
            make_model(MODEL, path)
        room = str(max(lengths) + WARM + 16 * PAGE)
        flags = ["--model-path", str(path), "--sp-size", "2", "--threads-per-rank", "1"]
        pool = ["--max-total-tokens", str(2 * int(room)), "--context-length", room]
        with Server(*flags, *pool) as server:
            rows = list(measure(server, lengths, budgets, args.forced, args.rounds))
    finish(best_floors(before, floors(2)), [*others(args.json, lengths), *rows], args.json)


def others(path: Path | None, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of other lengths that a result has already."""
    if path is None or not path.exists():
        return []
    return [row for row in json.loads(path.read_text())["raw"] if row["length"] not in lengths]


def finish(floor: dict[str, float], rows: list[dict[str, Any]], path: Path | None) -> None:
    """Report all rows, with what exact attention reaches of the floor."""
    figures = figures_of(rows)
    for length in {row["length"] for row in rows}:
        best = figures.pop(f"exact_flops_{length}") / floor["gemm_flops_per_s"]
        figures[f"share_of_floor_exact_sp2_{length}"] = best / figures[f"ttft_s_exact_sp2_{length}"]
    report(path, {**floor, **figures}, rows)


if __name__ == "__main__":
    main()

"""How fast are long prompts served, over prompt length x (sp, tp) x strategy?

For each model, two servers at a time run side by side with one thread per rank; requests alternate
A B B A, so both see the same machine. Random-weight models are made by `make_model.py` and attend
almost uniformly, which does not matter here: everything is exact.

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    Server,
    arguments,
    best_floors,
    floors,
    median,
    quantile,
    report,
)
from make_model import SHAPES, make_model
from streams import Stream

PAGE = 64


@dataclass(frozen=True)
class Setup:
    """One way to serve: a name for the figures, and the flags that make it."""

    name: str
    ranks: int
    flags: tuple[str, ...]


def setup(
    sp: int = 1, tp: int = 1, strategy: str = "auto", arch: str = "ntp", beside: str = ""
) -> Setup:
    """`beside` marks a repeated setup in a question's figures, so that it replaces no other's."""
    name = f"sp{sp}" + (f"_tp{tp}" if tp > 1 else "")
    name += f"_{strategy.replace('-', '_')}" if strategy != "auto" else ""
    name += "_sptp" if arch == "tp" else ""
    name += f"_beside_{beside}" if beside else ""
    flags = ("--sp-size", str(sp), "--tp-size", str(tp), "--sp-strategy", strategy)
    return Setup(name, sp * tp, (*flags, "--sp-arch", arch, "--threads-per-rank", "1"))


@dataclass(frozen=True)
class Question:
    """Compare `setups` (first against each other) on one model at some prompt lengths."""

    model: str
    lengths: tuple[int, ...]
    setups: tuple[Setup, Setup]
    new_tokens: int = 33
    rounds: int = 1


QUICK = (Question("embedded", (2048,), (setup(1), setup(2))),)
FULL = (
    Question("0.5b", (512, 2048, 8192), (setup(1), setup(2))),
    Question("0.5b", (4096,), (setup(2, strategy="pass-kv"), setup(2, strategy="pass-q"))),
    Question("0.5b", (4096,), (setup(2, strategy="ulysses"), setup(1, tp=2))),
    Question("0.5b", (2048,), (setup(2, arch="tp"), setup(2, beside="sptp"))),
    Question("gqa8", (2048,), (setup(1), setup(2))),
    Question("embedded", (2048, 8192, 32768), (setup(1), setup(2))),
    Question("0.5b", (16384,), (setup(1), setup(2))),
)
WATCHED = 4096
"""Tokens at most of the untimed prompt that memory is watched with: full chunks on two ranks."""
DECODED, BEFORE = 129, 8 * PAGE
"""Tokens of the run that measures a decode step's overhead, and of its prompt, which is long enough
to be spread over two ranks."""


def flops(shape: dict[str, int], tokens: int) -> float:
    """FLOPs of a causal prefill: linear layers (no logits but the last row's) and attention."""
    hidden, heads, kv, head_dim = (
        shape["hidden_size"],
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape["head_dim"],
    )
    linear = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    attention = 2 * heads * head_dim * tokens
    return shape["num_hidden_layers"] * tokens * (2.0 * linear + attention)


def step_bytes(shape: dict[str, int], context: int) -> float:
    """Bytes that one decode step must read: bf16 weights and KV."""
    hidden, heads, kv, head_dim = (
        shape["hidden_size"],
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape["head_dim"],
    )
    linear = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * linear + shape["vocab_size"] * hidden
    return 2.0 * weights + 4.0 * shape["num_hidden_layers"] * kv * head_dim * context


def one(server: Server, length: int, new_tokens: int, rng: random.Random) -> dict[str, Any]:
    """Serve one fresh random prompt; nothing of it is in the prefix cache."""
    before = server.state()
    ids = [rng.randrange(300, 1000) for _ in range(length)]
    stream: Stream = server.stream(ids, new_tokens)
    after = server.state()
    grown = {k: after[k] - before[k] for k in after if k.endswith("_total")}
    return {"ttft_s": stream.ttft, "gaps_s": stream.gaps, "counters": grown}


def overhead(row: dict[str, Any], side: Setup) -> float:
    """The share of a decode's wall time in which a rank was in no step: HTTP, scheduling, links.

    The prefill is counted in, on both sides of the division. All ranks must have taken part.
    """
    counters = row["counters"]
    inside = counters["compute_seconds_total"] + counters["exposed_seconds_total"]
    return 1.0 - inside / side.ranks / (row["ttft_s"] + sum(row["gaps_s"]))


def ask(question: Question, model: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Run one question A B B A; return raw rows."""
    rows = []
    room = str(max(question.lengths) + question.new_tokens + 8 * PAGE)
    common = [*model, "--max-total-tokens", room, "--context-length", room]
    a, b = question.setups
    with Server(*common, *a.flags) as server_a, Server(*common, *b.flags) as server_b:
        for server in (server_a, server_b):
            with server.watch_memory():
                one(server, min(WATCHED, max(question.lengths)), 4, rng)
        for length in question.lengths:
            for _ in range(question.rounds):
                for side, server in ((a, server_a), (b, server_b), (b, server_b), (a, server_a)):
                    row = one(server, length, question.new_tokens, rng)
                    rows.append({"setup": side.name, "length": length, "ranks": side.ranks, **row})
        for side, server in ((a, server_a), (b, server_b)):
            row = one(server, BEFORE, DECODED, rng)
            rows.append({"setup": side.name, "ranks": side.ranks, "overhead": overhead(row, side)})
            memory = {"peak_pss_bytes": server.peak_pss_bytes, "ready_s": server.ready_s}
            rows.append({"setup": side.name, **memory})
    return rows


def figures_of(question: Question, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians and quantiles by (setup, length), and the paired ratio of the two setups."""
    figures: dict[str, float] = {}
    model = question.model.replace(".", "_")
    for side in question.setups:
        mine = [row for row in rows if row["setup"] == side.name]
        for row in mine:
            if "overhead" in row:
                figures[f"step_overhead_share_{model}_{side.name}"] = row["overhead"]
            if "peak_pss_bytes" in row:
                figures[f"peak_pss_gb_{model}_{side.name}"] = row["peak_pss_bytes"] / 1e9
                figures[f"ready_s_{model}_{side.name}"] = row["ready_s"]
        for length in question.lengths:
            here = [row for row in mine if row.get("length") == length]
            figures.update(summary(f"{model}_{side.name}_{length}", side, length, here))
    a, b = question.setups
    for length in question.lengths:
        left = figures[f"ttft_s_{model}_{a.name}_{length}"]
        right = figures[f"ttft_s_{model}_{b.name}_{length}"]
        figures[f"ttft_ratio_{model}_{a.name}_over_{b.name}_{length}"] = left / right
    return figures


def summary(name: str, side: Setup, length: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    ttft = median([row["ttft_s"] for row in rows])
    gaps = [gap for row in rows for gap in row["gaps_s"]]
    decode = sum(sum(row["gaps_s"]) for row in rows)
    total = {key: sum(row["counters"][key] for row in rows) for key in rows[0]["counters"]}
    tokens = total["prompt_tokens_total"] + total["generated_tokens_total"]
    return {
        f"ttft_s_{name}": ttft,
        f"ttft_spread_{name}": max(r["ttft_s"] for r in rows) / min(r["ttft_s"] for r in rows),
        f"prefill_tokens_per_s_{name}": length / ttft,
        f"tbt_p50_ms_{name}": 1e3 * median(gaps),
        f"tbt_p99_ms_{name}": 1e3 * quantile(gaps, 0.99),
        f"decode_tokens_per_s_{name}": len(gaps) / decode,
        f"attention_bytes_per_token_{name}": total["sent_bytes_total"] / max(1, tokens),
        f"exposed_s_per_request_{name}": total["exposed_seconds_total"] / len(rows),
    }


def shares(
    question: Question, shape: dict[str, int], figures: dict[str, float], floor: dict[str, float]
) -> dict[str, float]:
    """Shares of the GEMM and memory floors; the floor scales with the ranks' threads."""
    result = {}
    model = question.model.replace(".", "_")
    for side in question.setups:
        part = min(side.ranks, 2) / 2
        for length in question.lengths:
            name = f"{model}_{side.name}_{length}"
            best = flops(shape, length) / (floor["gemm_flops_per_s"] * part)
            result[f"prefill_share_of_floor_{name}"] = best / figures[f"ttft_s_{name}"]
            read = step_bytes(shape, length) / floor["read_bytes_per_s"]
            result[f"decode_share_of_floor_{name}"] = read / (figures[f"tbt_p50_ms_{name}"] / 1e3)
    return result


def chosen(args: argparse.Namespace) -> list[Question]:
    """The questions that the command line asks for."""
    questions = QUICK if args.quick else FULL
    if args.only:
        model, length = args.only.rsplit(":", 1)
        pairs = (setup(1), setup(2))
        return [Question(model, (int(length),), pairs, rounds=args.rounds)]
    return list(questions)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", help="MODEL:LENGTH, sp=1 against sp=2 on one model and length")
    parser.add_argument("--rounds", type=int, default=1, help="A B B A this often, with --only")
    args = parser.parse_args()
    rng = random.Random(0)
    questions = chosen(args)
    before, alone = floors(2), floors(1)
    figures: dict[str, float] = {}
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for question in questions:
            flags = []
            if question.model != "embedded":
                path = Path(folder) / f"bench-{question.model}"
                if not path.exists():
                    make_model(question.model, path)
                flags = ["--model-path", str(path)]
            rows = ask(question, flags, rng)
            figures.update(figures_of(question, rows))
            raw.append({"model": question.model, "rows": rows})
    floor = best_floors(before, floors(2))
    for question in questions:
        if question.model in SHAPES:
            figures.update(shares(question, SHAPES[question.model], figures, floor))
    alone = best_floors(alone, floors(1))
    floor |= {f"{name}_1_thread": value for name, value in alone.items()}
    report(args.json, {**floor, **figures}, raw)


if __name__ == "__main__":
    main()

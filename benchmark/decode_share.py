"""What share of the memory floor does decoding over HTTP reach, where the memory's rate moves?

A machine that is shared gives its memory at 30 GB/s one second and at 65 the next, so floors
before and after a run say little about it. Here reads of memory and short streams take turns: a
round is a probe, one answer (of prompts that are cached, so that it begins at once), a probe; its
share is what its steps had to read (weights once, KV of every request) over its time and over the
faster of its two probes. Shares of many rounds are told as quartiles, those of rounds whose probes
agree apart.

    python benchmark/decode_share.py --model DIR [--cells b1_512 b8_512 b1_8192] [--rounds 40]
        [--forms bf16 int8 int4] [--json FILE] [-- FLAGS]

Quantized weights are one server after another; their shares count their own bytes.

Two ranks of one thread, which are bound to their cores: servers in turns would have to share them,
so commits and flags are compared by running this for each, more than once.
Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import READS, Server, arguments, median, quantile, report
from peers.maths import HIDDEN, LINEAR, VOCABULARY, decode_rate, step_bytes

TOKENS, TOGETHER = 49, 129
"""Of an answer; of each of several, which begin up to a second apart, for every one computes the
last page of its prompt: only while all of them decode is counted."""
FORMS = {"bf16": (16.0, 16.0), "int8": (8.25, 8.25), "int4": (4.25, 8.25)}
"""Bits of a weight with its scale (groups of 64): of layers, and of the head."""
ALIKE = 1.1
"""Probes of a round agree within this factor."""
_PROBE = (
    READS
    + """
import sys, time
torch.set_num_threads(2)
nbytes, reads = reads_of(4096)
def seconds(read):
    start = time.perf_counter(); read(); return time.perf_counter() - start
for line in sys.stdin:
    print(nbytes / min(seconds(read) for _ in range(3) for read in reads[:2]), flush=True)
"""
)


@contextmanager
def probing() -> Iterator[subprocess.Popen[str]]:
    """A process that reads 256 MB, two ways, whenever it is told a line."""
    command = [sys.executable, "-c", _PROBE]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def probe(process: subprocess.Popen[str]) -> float:
    """Bytes a second, the best of six reads."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def answers(server: Server, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """Arrival times of each stream's tokens."""
    return [stream.times for stream in server.streams(prompts, tokens)]


def needed_bytes(form: str, batch: int, context: float) -> float:
    """Bytes of a step: as `step_bytes`, with the weights' own formats."""
    layers, head = FORMS[form]
    saved = LINEAR * (16 - layers) + VOCABULARY * HIDDEN * (16 - head)
    return step_bytes(batch, context) - saved / 8


def measure(
    server: Server, form: str, cell: str, rounds: int, prober: subprocess.Popen[str]
) -> Iterator[dict[str, Any]]:
    """Rounds of one cell."""
    name = cell if form == "bf16" else f"{form}_{cell}"
    batch, length = (int(part.strip("b")) for part in cell.split("_"))
    rng = random.Random(cell)
    prompts = [[rng.randrange(300, 1000) for _ in range(length)] for _ in range(batch)]
    answers(server, prompts, 8)
    tokens = TOKENS if batch == 1 else TOGETHER
    needed = needed_bytes(form, batch, length + tokens / 2)
    for _ in range(rounds):
        before = probe(prober)
        rate = decode_rate(answers(server, prompts, tokens))
        floor = (before, probe(prober))
        share = needed * rate / batch / max(floor)
        yield {"cell": name, "tokens_per_s": rate, "floor": floor, "share": share}


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By cell, quartiles of shares, the median rate and floor; rounds with a steady floor apart."""
    figures: dict[str, float] = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        mine = [row for row in rows if row["cell"] == cell]
        steady = [row for row in mine if max(row["floor"]) < ALIKE * min(row["floor"])]
        for kind, chosen in (("", mine), ("_steady", steady)):
            figures[f"rounds{kind}_{cell}"] = len(chosen)
            if not chosen:
                continue
            for q in (0.25, 0.5, 0.75):
                share = quantile([row["share"] for row in chosen], q)
                figures[f"share_q{round(100 * q)}{kind}_{cell}"] = share
            rates = [row["tokens_per_s"] for row in chosen]
            figures[f"decode_tokens_per_s{kind}_{cell}"] = median(rates)
            floors = [max(row["floor"]) for row in chosen]
            figures[f"read_bytes_per_s{kind}_{cell}"] = median(floors)
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="a directory of the 0.5b shape")
    parser.add_argument("--cells", nargs="+", default=["b1_512", "b8_512", "b1_8192"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--forms", nargs="+", default=["bf16"], choices=FORMS)
    parser.add_argument("flags", nargs="*", help="of the servers, behind --")
    args = parser.parse_args()
    flags = ["--model-path", str(args.model), "--sp-size", "2", "--threads-per-rank", "1"]
    room = ["--max-total-tokens", "20000", "--context-length", "9000", *args.flags]
    rounds = 3 if args.quick else args.rounds
    rows: list[dict[str, Any]] = []
    for form in args.forms:
        quantized = [] if form == "bf16" else ["--quantization", form]
        with Server(*flags, *room, *quantized) as server, probing() as prober:
            for cell in args.cells:
                rows += measure(server, form, cell, rounds, prober)
    report(args.json, figures_of(rows), rows)


if __name__ == "__main__":
    main()

"""What do bound ranks, other processes' priority and the allocator's settings change?

One server on two ranks is asked under four settings of its living processes, in the order
A B C D D C B A, so that all settings see the same memory and the same machine: nothing bound, ranks
bound to a core each, and beside bound ranks the HTTP process, or only its threads that tokenize, at
lower priority. Meanwhile another process polls `/health` and has long texts tokenized. The
allocator cannot be changed in a living process: for it, two servers of one rank run side by side,
A B B A.

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Server, arguments, children, median, quantile, report, tree_pss
from make_model import make_model

POLL_S, TOKENIZE_S = 0.05, 0.2
TEXT = "The quick brown fox jumps over the lazy dog. " * 400
STREAMS, DECODED = 4, 25
SETTINGS = ("none", "bound", "bound_http_nice", "bound_tokenizer_nice")
NICE = 10
THEIR_OWN = {"MALLOC_PERTURB_": "0"}
"""An allocator variable of the user's own, at glibc's default: ranks then set nothing."""


def role(pid: int) -> str:
    """``rank``, ``scheduler``, ``http`` or ``other``."""
    names = {"runner.process": "rank", "scheduler.process": "scheduler", "server.process": "http"}
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        for module, name in names.items():
            if f"sps_runtime.{module}" in command:
                return name
    return "other"


def comm(pid: int, thread: int) -> str:
    return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()


def threads_of(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def apply(server: Server, setting: str) -> None:
    """Bind and prioritise every thread of a living server's processes."""
    everywhere = os.sched_getaffinity(0)
    cores, usual = sorted(everywhere), os.getpriority(os.PRIO_PROCESS, 0)
    number = 0
    for pid in sorted(children(server.process.pid)):
        kind, bound = role(pid), everywhere
        if kind == "rank" and setting != "none":
            bound = {cores[number % len(cores)]}
            number += 1
        for thread in threads_of(pid):
            tokenizes = thread != pid and not comm(pid, thread).startswith("ZMQ")
            low = setting == "bound_http_nice" or (setting == "bound_tokenizer_nice" and tokenizes)
            os.sched_setaffinity(thread, bound)
            os.setpriority(os.PRIO_PROCESS, thread, usual + NICE * (low and kind == "http"))


def load(port: int) -> None:
    """Poll and tokenize until killed; its own work has the lowest priority."""
    os.nice(19)

    def every(seconds: float, method: str, path: str, body: bytes | None) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            connection.getresponse().read()
            connection.close()
            time.sleep(seconds)

    texts = json.dumps({"prompt": TEXT, "add_special_tokens": False}).encode()
    args = (POLL_S, "GET", "/health", None)
    threading.Thread(target=every, args=args, daemon=True).start()
    every(TOKENIZE_S, "POST", "/tokenize", texts)


@contextlib.contextmanager
def loaded(server: Server) -> Iterator[None]:
    command = [sys.executable, __file__, "--load", str(server.port)]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(300, 1000) for _ in range(length)]


def together(server: Server, rng: random.Random, streams: int, tokens: int) -> list[float]:
    """Seconds between tokens of several streams that decode together."""
    gaps: list[float] = []

    def one(ids: list[int]) -> None:
        gaps.extend(server.stream(ids, tokens).gaps[4:])

    workers = [threading.Thread(target=one, args=(prompt(rng, 64),)) for _ in range(streams)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return gaps


def ask(server: Server, setting: str, length: int, rng: random.Random) -> dict[str, Any]:
    apply(server, setting)
    return {
        "setting": setting,
        "ttft_s": server.stream(prompt(rng, length), 1).ttft,
        "gaps_s": together(server, rng, 1, DECODED),
        "gaps_s_batch": together(server, rng, STREAMS, DECODED),
    }


def ask_bound(flags: list[str], length: int, rounds: int, rng: random.Random) -> list[Any]:
    rows = []
    with Server(*flags, "--sp-size", "2", "--threads-per-rank", "1") as server:
        server.stream(prompt(rng, length), 8)
        with loaded(server):
            for _ in range(rounds):
                for setting in (*SETTINGS, *reversed(SETTINGS)):
                    rows.append(ask(server, setting, length, rng))
    return rows


def ask_allocator(flags: list[str], length: int, rounds: int, rng: random.Random) -> list[Any]:
    rows = []
    alone = [*flags, "--threads-per-rank", "1"]
    with Server(*alone) as ours, Server(*alone, environment=THEIR_OWN) as glibc:
        for server in (ours, glibc):
            server.stream(prompt(rng, length), 2)
        for _ in range(rounds):
            for name, server in (
                ("ours", ours),
                ("glibc", glibc),
                ("glibc", glibc),
                ("ours", ours),
            ):
                ttft = server.stream(prompt(rng, length), 1).ttft
                rows.append({"setting": name, "ttft_s": ttft})
        for name, server in (("ours", ours), ("glibc", glibc)):
            rows.append({"setting": name, "pss_bytes": tree_pss(server.process.pid)})
    return rows


def figures_bound(rows: list[dict[str, Any]], length: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting]
        ttfts = [row["ttft_s"] for row in mine]
        figures[f"ttft_s_{setting}_sp2_{length}"] = median(ttfts)
        figures[f"ttft_spread_{setting}_sp2_{length}"] = max(ttfts) / min(ttfts)
        for kind, batch in (("gaps_s", 1), ("gaps_s_batch", STREAMS)):
            gaps = [gap for row in mine for gap in row[kind]]
            figures[f"tbt_p50_ms_{setting}_sp2_batch{batch}"] = 1e3 * median(gaps)
            figures[f"tbt_p99_ms_{setting}_sp2_batch{batch}"] = 1e3 * quantile(gaps, 0.99)
    return figures


def figures_allocator(rows: list[dict[str, Any]], length: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for setting in ("ours", "glibc"):
        mine = [row for row in rows if row["setting"] == setting]
        ttfts = [row["ttft_s"] for row in mine if "ttft_s" in row]
        figures[f"ttft_s_malloc_{setting}_sp1_{length}"] = median(ttfts)
        figures[f"ttft_spread_malloc_{setting}_sp1_{length}"] = max(ttfts) / min(ttfts)
        figures[f"pss_gb_malloc_{setting}_sp1"] = (
            next(row["pss_bytes"] for row in mine if "pss_bytes" in row) / 1e9
        )
    ours, glibc = (figures[f"ttft_s_malloc_{name}_sp1_{length}"] for name in ("ours", "glibc"))
    return figures | {f"ttft_ratio_malloc_glibc_over_ours_sp1_{length}": glibc / ours}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--load", type=int, help="be the load of a server on this port")
    parser.add_argument("--model", default="0.5b", help="a shape, or the directory of a model")
    parser.add_argument("--only", choices=("bound", "allocator"), help="half of the questions")
    parser.add_argument("--rounds", type=int, default=1, help="how often each order is run")
    args = parser.parse_args()
    if args.load:
        return load(args.load)
    length = 512 if args.quick else 1024
    rng = random.Random(0)
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.model)
        if not path.is_dir():
            path = make_model(args.model, folder)
        flags = ["--model-path", str(path), "--max-total-tokens", "8192"]
        if args.only != "allocator":
            raw["bound"] = ask_bound(flags, length, args.rounds, rng)
            figures |= figures_bound(raw["bound"], length)
        if args.only != "bound":
            raw["allocator"] = ask_allocator(flags, length, args.rounds, rng)
            figures |= figures_allocator(raw["allocator"], length)
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()

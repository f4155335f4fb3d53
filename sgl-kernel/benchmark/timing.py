"""Timing shared by the benchmarks: floors of this machine, best of several, JSON."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sps_kernel


def arguments(doc: str | None, **flags: str) -> argparse.Namespace:
    """``--quick``, ``--json FILE`` and `flags` (name: help); sets torch to one thread."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and cases")
    parser.add_argument("--json", type=Path, help="write machine, commit, figures and raw times")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    torch.set_num_threads(1)
    return parser.parse_args()


def best_seconds(call: Callable[[], object], repetitions: int) -> list[float]:
    """CPU seconds of the calling thread, per repetition, after one warm-up.

    CPU time leaves out being preempted, though not shared caches and memory: take the minimum.
    """
    call()
    times = []
    for _ in range(repetitions):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return times


def gemm_peak(dtype: torch.dtype, repetitions: int = 5, size: int = 1024) -> float:
    """GFLOP/s of torch's (oneDNN's) square matrix product, one thread: the compute floor."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(best_seconds(lambda: a @ b, repetitions)) / 1e9


def read_speed(repetitions: int = 5, megabytes: int = 256) -> float:
    """GB/s at which one thread sums a float32 array that fits no cache: the memory floor."""
    x = torch.ones(megabytes * 1024 * 256)
    return x.numel() * 4 / min(best_seconds(x.sum, repetitions)) / 1e9


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = Path("/proc/loadavg").read_text().split()[0]
    return {"cpu": model, "isa": sps_kernel.current_isa(), "load_average": float(load)}


def commit() -> str:
    """The checkout's commit, or "unknown"."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(path: Path | None, figures: dict[str, float], raw: dict[str, list[float]]) -> None:
    """Print the figures; write them where ``--json`` says."""
    for name, value in figures.items():
        print(f"{name:58s} {value:10.2f}")
    if path is not None:
        result = {"machine": machine(), "commit": commit(), "figures": figures, "raw": raw}
        path.write_text(json.dumps(result, indent=1) + "\n")

"""Times on a device, and what they are held against: ceilings measured on the same device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GEMM = 8192
COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Budget:
    """Until when a section may begin something new.

    Attributes:
        ends: of `time.monotonic`.
    """

    ends: float

    @property
    def over(self) -> bool:
        return time.monotonic() > self.ends


def synchronize(device: torch.device) -> None:
    """Between measurements only: nothing that is timed does this."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    run: Callable[[], object], device: torch.device, rounds: int = 20, warm: int = 3
) -> float:
    """Median seconds of a call, by events around each on a GPU."""
    for _ in range(warm):
        run()
    synchronize(device)
    if device.type != "cuda":
        return statistics.median(_clocked(run) for _ in range(max(3, rounds // 4)))
    pairs = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        pairs.append((began, ended))
    synchronize(device)
    return statistics.median(began.elapsed_time(ended) / 1e3 for began, ended in pairs)


def _clocked(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Ceilings:
    """The best that this device did.

    Attributes:
        bytes_per_s: read and written, of a copy.
        flops_per_s: of a bf16 matrix product of random values.
    """

    bytes_per_s: float
    flops_per_s: float


def ceilings(device: torch.device, quick: bool) -> Ceilings:
    """The best of five copies of 4 GiB and of five products of 8,192 (small ones where quick)."""
    size, nbytes = (512, 16 << 20) if quick else (GEMM, COPY_BYTES)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    copy = min(seconds_of(lambda: target.copy_(source), device, 5) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, device, 10) for _ in range(2))
    return Ceilings(2 * nbytes / copy, 2 * size**3 / product)

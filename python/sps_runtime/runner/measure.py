"""What multiplying and crossing ranks cost here, measured at start: the planner's cost model."""

from __future__ import annotations

import time
from statistics import median

import torch

from sps_runtime.distributed.communicator import Communicator
from sps_runtime.types.messages import LinkCost

SMALL_ROUNDS, LARGE_ROUNDS = 30, 4
LARGE_BYTES = 4 << 20
MATRIX = 1024
MATRIX_SECONDS = 0.05


def measure_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of this rank's matrix multiplication, in `dtype`."""
    a = torch.randn(MATRIX // 2, MATRIX).to(dtype)
    b = torch.randn(MATRIX, MATRIX).to(dtype)
    torch.nn.functional.linear(a, b)
    flops, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < MATRIX_SECONDS:
        torch.nn.functional.linear(a, b)
        flops += 2 * a.shape[0] * MATRIX * MATRIX
    return flops / took


def measure_link(sp: Communicator, world: Communicator, *, zero_copy: bool) -> LinkCost:
    """Latency and bandwidth of an exchange between all SP peers; the worst rank's, on all.

    A collective call. In an exchange of n members each sends n - 1 messages; their bytes over the
    exchange's seconds are the bandwidth.

    Args:
        sp: all SP ranks with this rank's TP rank.
        world: all ranks.
    """
    if sp.size == 1:
        return LinkCost(zero_copy=zero_copy)
    latency = _time(sp, 8, SMALL_ROUNDS)
    large = _time(sp, LARGE_BYTES, LARGE_ROUNDS)
    rate = (sp.size - 1) * LARGE_BYTES / max(large - latency, 1e-9)
    mine = torch.tensor([latency, rate], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    world.exchange([mine] * world.size, everyone, "control")
    table = torch.stack(everyone)
    return LinkCost(float(table[:, 0].max()), float(table[:, 1].min()), zero_copy)


def _time(sp: Communicator, nbytes: int, rounds: int) -> float:
    """Median seconds of an exchange in which every member sends `nbytes` to every other."""
    send = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(sp.size)]
    recv = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(sp.size)]
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        sp.exchange(send, recv, "control")
        seconds.append(time.perf_counter() - began)
    return median(seconds)

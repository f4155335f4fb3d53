"""What multiplying and crossing ranks cost here, measured at start: the planner's cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from statistics import median

import torch
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator
from sps_runtime.layers.linear import ColumnLinear
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.layers.step import LinearPlacement
from sps_runtime.models.decoder import Decoder, DecoderLayer
from sps_runtime.ops.devices import CPU, Fence
from sps_runtime.ops.operators import Operators
from sps_runtime.ops.recording import StepRecorder
from sps_runtime.types.messages import DecodeCost, LinkCost

SMALL_ROUNDS, LARGE_ROUNDS = 30, 4
LARGE_BYTES = 4 << 20
FLOPS, LEAST_ROWS, MOST_ROWS = 5e9, 32, 512
"""Of one product that is timed: enough rows to be bound by arithmetic."""
FLOPS_ROUNDS = 3
DECODE_ROWS = (1, 2, 4, 8, 16)
DECODE_BYTES = 128 << 20
"""Weights of the layers that are timed in turn: a rank's part of them is more than caches hold."""
DECODE_ROUNDS = 4
GPU_ROWS = 4096


@torch.inference_mode()
def measure_flops(
    gate_up: ColumnLinear,
    dtype: torch.dtype,
    links: GroupLinks,
    ops: Operators,
    device: torch.device = CPU,
) -> float:
    """Floating-point operations per second of a product with many rows of a layer's weights.

    The best of three, by all ranks at once; nothing crosses.
    """
    outputs, inputs = gate_up.weight_ND.shape
    rows = int(min(max(FLOPS / (2 * outputs * inputs), LEAST_ROWS), MOST_ROWS))
    if device.type != "cpu":
        rows = GPU_ROWS
    x_TD = torch.randn(rows, inputs).to(device, dtype)
    linear = place("sharded", "ntp", links, (rows,), ops)
    rounds = FLOPS_ROUNDS if device.type == "cpu" else 2 * FLOPS_ROUNDS
    seconds = [_timed(lambda: gate_up(linear, x_TD), device) for _ in range(rounds)]
    return 2.0 * rows * outputs * inputs / min(seconds)


@torch.inference_mode()
def measure_decode(
    model: Decoder, links: GroupLinks, ops: Operators, recorder: StepRecorder | None = None
) -> DecodeCost:
    """Seconds of a layer's linear part with few rows, in both placements; the worst rank's, on all.

    A collective call. Layers are timed in turn, so that their weights come from memory. The head is
    left out: it is one more layer of the same kind, and more than all of them to measure. Each
    placement is timed as steps run it: replicated ones are replayed where they can be recorded.
    They take turns, for memory that others use too may be twice as fast a second later. Where each
    rank multiplies by whole weights, ranks begin with different layers: those that go through the
    same ones at once read them from each other's cache, and homes that serve do not.

    Args:
        links: of the group of all SP ranks.
        recorder: of this rank's decode steps, None where they are not recorded.
    """
    layers = model.layers[: _layers_to_time(model)]
    first = len(layers) * links.sp.rank // links.sp.size
    apart = [*layers[first:], *layers[:first]]
    sharded, replicated = [], []
    for rows in DECODE_ROWS:
        x_TD = torch.randn(rows, model.config.hidden_size).to(model.device, model.dtype)
        members = (rows,) * links.sp.size
        whole = place("sharded", "ntp", links, members, ops)
        slices = place("replicated", "ntp", links, members, ops)
        called = _all_layers(layers, x_TD, slices)
        runs: list[Callable[[], object]] = [_all_layers(apart, x_TD, whole), called]
        if recorder is not None and links.recordable:
            _, recording = recorder.record(called)
            runs[1] = called if isinstance(recording, str) else recording.replay
        seconds = _in_turns(runs, links, x_TD.device)
        sharded.append(seconds[0] / len(layers))
        replicated.append(seconds[1] / len(layers))
    worst = _worst(links.world, [*sharded, *replicated])
    count = len(DECODE_ROWS)
    return DecodeCost(DECODE_ROWS, tuple(worst[:count]), tuple(worst[count:]), links.sp.size)


def linear_part(layer: DecoderLayer, x_TD: Tensor, linear: LinearPlacement) -> Tensor:
    """All of a layer that its placement decides; queries stand for what attention returns."""
    attention, unit = layer.attention, layer.attention.head_dim
    parts = attention.qkv(linear, linear.enter(x_TD))
    q_TN, *_ = linear.to_tokens_each(parts, attention.qkv.sizes, unit)
    update_TD = attention.output(linear, linear.to_columns(q_TN.contiguous(), unit))
    return layer.mlp(linear, update_TD)


def _all_layers(
    layers: list[DecoderLayer], x_TD: Tensor, linear: LinearPlacement
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for layer in layers:
            update_TD = linear_part(layer, x_TD, linear)
        return update_TD

    return run


def _in_turns(
    runs: Sequence[Callable[[], object]], links: GroupLinks, device: torch.device
) -> list[float]:
    """The least seconds of each."""
    seconds: list[list[float]] = []
    for _ in range(DECODE_ROUNDS):
        row = []
        for run in runs:
            _worst(links.world, [0.0])  # all begin together
            row.append(_timed(run, device))
        seconds.append(row)
    return [min(column) for column in zip(*seconds, strict=True)]


def _layers_to_time(model: Decoder) -> int:
    layer = model.layers[0]
    weights = [layer.attention.qkv.weight_ND, layer.attention.output.weight_DN]
    weights += [layer.mlp.gate_up.weight_ND, layer.mlp.down.weight_DN]
    nbytes = sum(weight.nbytes for weight in weights)
    return min(len(model.layers), ceil(DECODE_BYTES / nbytes))


def _timed(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds until all that `run` launched is done; nothing else was launched before."""
    done = Fence(device)
    began = time.perf_counter()
    run()
    done.record()
    done.wait()
    return time.perf_counter() - began


def measure_link(
    sp: Communicator, world: Communicator, *, zero_copy: bool, device: torch.device = CPU
) -> LinkCost:
    """Latency and bandwidth of an exchange between all SP peers; the worst rank's, on all.

    A collective call. In an exchange of n members each sends n - 1 messages; their bytes over the
    exchange's seconds are the bandwidth.

    Args:
        sp: all SP ranks with this rank's TP rank.
        world: all ranks.
    """
    if sp.size == 1:
        return LinkCost(zero_copy=zero_copy)
    latency = _time(sp, 8, SMALL_ROUNDS, device)
    large = _time(sp, LARGE_BYTES, LARGE_ROUNDS, device)
    rate = (sp.size - 1) * LARGE_BYTES / max(large - latency, 1e-9)
    latency, slowness = _worst(world, [latency, 1.0 / rate])
    return LinkCost(latency, 1.0 / slowness, zero_copy)


def _worst(world: Communicator, values: list[float]) -> list[float]:
    """The largest of all ranks' values, one by one, on all ranks."""
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    world.exchange([mine] * world.size, everyone, "control")
    return torch.stack(everyone).amax(dim=0).tolist()


def _time(sp: Communicator, nbytes: int, rounds: int, device: torch.device) -> float:
    """Median seconds of an exchange in which every member sends `nbytes` to every other."""
    send = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(sp.size)]
    recv = [torch.empty_like(message) for message in send]
    return median(_timed(lambda: sp.exchange(send, recv, "control"), device) for _ in range(rounds))

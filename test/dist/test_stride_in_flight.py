"""Stride attention in flight between hosts: a step in one piece's logits, counters and bytes."""

from __future__ import annotations

import pytest
import torch
from test.dist.helpers.flights import BOUND, Ran, blocks_flown, odd_requests, run_requests

from sps_runtime.attention.sequence_parallel.in_flight.stride import FlyingStride
from sps_runtime.types.attention import AttentionSpec, SparseSettings

COUNTERS = ("read_pairs", "causal_pairs", "fetched_units", "remote_units", "remote_bytes")


def run(
    kind: str,
    hosts: tuple[int, ...],
    page_size: int,
    dealing: str,
    levels: tuple[tuple[int, int], ...],
    pipeline: bool,
) -> Ran:
    spec = AttentionSpec("csa", SparseSettings(estimator="stride", superblock=128, levels=levels))
    requests = odd_requests(spec, new=2)
    return run_requests(
        kind, hosts, page_size, requests, COUNTERS, pipeline=pipeline, dealing=dealing
    )


@pytest.mark.parametrize(
    ("kind", "hosts", "page_size", "dealing", "levels"),
    [
        ("llama", (0, 1), 64, "contiguous", ()),
        ("qwen3", (0, 1), 16, "zigzag", ()),
        ("llama", (0, 0, 1, 1), 16, "contiguous", ((2, 2),)),
        ("qwen3", (0, 1, 2), 64, "random", ()),
    ],
)
def test_micro_batches_change_nothing(
    kind: str,
    hosts: tuple[int, ...],
    page_size: int,
    dealing: str,
    levels: tuple[tuple[int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    flown = blocks_flown(monkeypatch, FlyingStride, "_local")
    together = run(kind, hosts, page_size, dealing, levels, False)
    assert not flown and sum(together.sent) > 0
    in_flight = run(kind, hosts, page_size, dealing, levels, True)
    assert flown and min(flown) > 1
    assert (in_flight.counters, in_flight.sent) == (together.counters, together.sent)
    for one, other in zip(in_flight.logits, together.logits, strict=True):
        assert float((one - other).abs().max()) < BOUND

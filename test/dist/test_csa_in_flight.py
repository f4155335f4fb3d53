"""Sparse micro-batches in flight between hosts: one host's choices, logits and bytes."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
import torch
from test.dist.helpers.flights import BOUND, Ran, blocks_flown, odd_requests, run_requests

from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.types.attention import AttentionSpec, SparseSettings

SETTINGS = SparseSettings(
    budget=0.25, minimum=2, window=1, rows=8, block=64, superblock=128, wide_from=512
)
COUNTERS = ("read_pairs", "causal_pairs", "fetched_units", "remote_units", "fallbacks")


def run(
    kind: str, hosts: tuple[int, ...], page_size: int, pipeline: bool, **changes: object
) -> Ran:
    spec = AttentionSpec("csa", msgspec.structs.replace(SETTINGS, **changes))
    requests = odd_requests(spec, new=3)
    return run_requests(kind, hosts, page_size, requests, COUNTERS, pipeline=pipeline)


def same(found: Ran, wanted: Ran) -> None:
    """Rows are multiplied in other company, so that sums round otherwise: a page that stood at the
    threshold may fall on its other side, and another in its place."""
    totals, wanted_totals = total(found), total(wanted)
    got, want = totals.pop("fetched_units"), wanted_totals["fetched_units"]
    assert totals.items() <= wanted_totals.items()
    assert abs(got - want) <= 0.02 * want
    bound = BOUND if got == want else 100 * BOUND
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert float((one - other).abs().max()) < bound


def total(ran: Ran) -> dict[str, int]:
    found = Counter[str]()
    for counters in ran.counters:
        found.update(counters)
    return dict(found)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("kind", "hosts", "page_size"),
    [
        ("llama", (0, 1), 64),
        ("qwen3", (0, 1), 16),
        ("llama", (0, 0, 1, 1), 16),
        ("qwen3", (0, 1, 2), 64),
    ],
)
def test_hosts_and_micro_batches_change_nothing(
    kind: str, hosts: tuple[int, ...], page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flown = blocks_flown(monkeypatch, Flight, "plans")
    alone = run(kind, (0,) * len(hosts), page_size, False)
    together = run(kind, hosts, page_size, False)
    assert not flown
    in_flight = run(kind, hosts, page_size, True)
    assert flown and min(flown) > 1
    same(together, alone)
    same(in_flight, alone)
    sent = sum(alone.sent)
    assert sent < sum(together.sent) < 1.1 * sent  # questions
    assert abs(sum(in_flight.sent) - sent) < 0.2 * sent  # a last token shares with others


@pytest.mark.parametrize("changes", [{"max_tau": 0.1}, {"tail": "none"}, {"estimator": "quest"}])
def test_other_settings_fly_too(changes: dict[str, object]) -> None:
    same(run("llama", (0, 1), 64, True, **changes), run("llama", (0, 0), 64, False, **changes))

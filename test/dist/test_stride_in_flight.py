"""Stride attention in flight between hosts: a step in one piece's logits, counters and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from torch import Tensor

from sps_runtime.attention.sequence_parallel.in_flight.stride import FlyingStride
from sps_runtime.types.attention import AttentionSpec, SparseSettings

PAGES = {16: 700, 64: 200}
BOUND = 1e-4


@dataclass
class Ran:
    logits: list[Tensor]
    counters: list[dict[str, int]]
    sent: list[int]


def requests_of(levels: tuple[tuple[int, int], ...]) -> list[Request]:
    """Odd lengths, chunks, a shared prefix."""
    spec = AttentionSpec("csa", SparseSettings(estimator="stride", superblock=128, levels=levels))
    first = Request(prompt(1037), 2, chunk=0)
    found = [
        first,
        Request(prompt(1025, seed=2), 2, chunk=0),
        Request(prompt(1037, seed=5), 2, chunk=512),
        Request(first.prompt[:768] + prompt(333, seed=8), 2, prefix_of=first, chunk=0),
    ]
    for request in found:
        request.attention = spec
    return found


def run(
    kind: str,
    hosts: tuple[int, ...],
    page_size: int,
    dealing: str,
    levels: tuple[tuple[int, int], ...],
    pipeline: bool,
) -> Ran:
    model, sp = exact_model(kind), len(hosts)
    engine = ThreadEngine(
        model.config,
        model.arena(1),
        sp=sp,
        page_size=page_size,
        pages_per_rank=PAGES[page_size],
        hosts=hosts,
        pipeline=pipeline,
    )
    shape = Shape(
        sp, page_size, PAGES[page_size], dealing=dealing, decode="sharded", overlap=False, seed=3
    )
    planner, found = Planner(shape), Ran([], [], [])
    names = ("read_pairs", "causal_pairs", "fetched_units", "remote_units", "remote_bytes")
    try:
        for request in requests_of(levels):
            ran = drive(engine, planner, [request])
            found.logits.append(torch.stack(ran.logits[request.slot]))
            for plan, results in zip(ran.plans, ran.results, strict=True):
                if plan.sequences[0].count > 1:
                    sparse = [one for result in results for one in result.sparse]
                    found.counters.append({n: sum(getattr(c, n) for c in sparse) for n in names})
                    found.sent.append(sum(result.counters.sent_bytes for result in results))
    finally:
        engine.close()
    return found


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
    flown, init = [], FlyingStride.__init__

    def counted(self: FlyingStride, *arguments: object) -> None:
        init(self, *arguments)
        flown.append(len(self._local))

    monkeypatch.setattr(FlyingStride, "__init__", counted)
    together = run(kind, hosts, page_size, dealing, levels, False)
    assert not flown and sum(together.sent) > 0
    in_flight = run(kind, hosts, page_size, dealing, levels, True)
    assert flown and min(flown) > 1
    assert (in_flight.counters, in_flight.sent) == (together.counters, together.sent)
    for one, other in zip(in_flight.logits, together.logits, strict=True):
        assert float((one - other).abs().max()) < BOUND

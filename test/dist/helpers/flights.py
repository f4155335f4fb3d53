"""Long prefills between hosts, in one piece or in blocks that fly: what of them must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from torch import Tensor

from sps_runtime.types.attention import AttentionSpec

PAGES = {16: 700, 64: 200}
BOUND = 1e-4


@dataclass
class Ran:
    """Logits by request; by prefill step the sum of each counter, and bytes that ranks sent."""

    logits: list[Tensor]
    counters: list[dict[str, int]]
    sent: list[int]


def odd_requests(spec: AttentionSpec, new: int) -> list[Request]:
    """Odd lengths, a last superblock of one token, chunks, a shared prefix."""
    first = Request(prompt(1037), new, chunk=0)
    found = [
        first,
        Request(prompt(1025, seed=2), new, chunk=0),
        Request(prompt(1037, seed=5), new, chunk=512),
        Request(first.prompt[:768] + prompt(333, seed=8), new, prefix_of=first, chunk=0),
    ]
    for request in found:
        request.attention = spec
    return found


def run_requests(
    kind: str,
    hosts: tuple[int, ...],
    page_size: int,
    requests: Sequence[Request],
    counters: Sequence[str],
    *,
    pipeline: bool,
    **shape: Any,
) -> Ran:
    """Run requests one after another.

    Args:
        counters: fields of `SparseCounters`.
        shape: of `Shape`, beside what is told by the others.
    """
    model, sp, pages = exact_model(kind), len(hosts), PAGES[page_size]
    engine = ThreadEngine(
        model.config,
        model.arena(1),
        sp=sp,
        page_size=page_size,
        pages_per_rank=pages,
        hosts=hosts,
        pipeline=pipeline,
    )
    planner = Planner(
        Shape(sp, page_size, pages, decode="sharded", overlap=False, seed=3, **shape)
    )
    found = Ran([], [], [])
    try:
        for request in requests:
            ran = drive(engine, planner, [request])
            found.logits.append(torch.stack(ran.logits[request.slot]))
            for plan, results in zip(ran.plans, ran.results, strict=True):
                if plan.sequences[0].count > 1:
                    sparse = [one for result in results for one in result.sparse]
                    found.counters.append({n: sum(getattr(c, n) for c in sparse) for n in counters})
                    found.sent.append(sum(result.counters.sent_bytes for result in results))
    finally:
        engine.close()
    return found


def blocks_flown(monkeypatch: pytest.MonkeyPatch, flying: type, blocks: str) -> list[int]:
    """Grows by the number of blocks whenever a `flying` is made; `blocks` is its attribute."""
    flown: list[int] = []
    init = flying.__init__

    def counted(self: Any, *arguments: object) -> None:
        init(self, *arguments)
        flown.append(len(getattr(self, blocks)))

    monkeypatch.setattr(flying, "__init__", counted)
    return flown

"""Sparse micro-batches in flight between hosts: one host's choices, logits and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from torch import Tensor

from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.types.attention import AttentionSpec, SparseSettings

SETTINGS = SparseSettings(
    budget=0.25, minimum=2, window=1, rows=8, block=64, superblock=128, wide_from=512
)
PAGES = {16: 700, 64: 200}
BOUND = 1e-4
NEW = 3


@dataclass
class Ran:
    """Logits by request; counters, and bytes that ranks sent, of all prefills."""

    logits: list[Tensor]
    counters: dict[str, int]
    sent: int


def requests_of(changes: dict[str, object]) -> list[Request]:
    """Odd lengths, a last superblock of one token, chunks, a shared prefix."""
    spec = AttentionSpec("csa", SparseSettings(**{**SETTINGS_FIELDS, **changes}))
    first = Request(prompt(1037), NEW, chunk=0)
    found = [
        first,
        Request(prompt(1025, seed=2), NEW, chunk=0),
        Request(prompt(1037, seed=5), NEW, chunk=512),
        Request(first.prompt[:768] + prompt(333, seed=8), NEW, prefix_of=first, chunk=0),
    ]
    for request in found:
        request.attention = spec
    return found


SETTINGS_FIELDS = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}


def run(
    kind: str, hosts: tuple[int, ...], page_size: int, pipeline: bool, **changes: object
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
    shape = Shape(sp, page_size, PAGES[page_size], decode="sharded", overlap=False, seed=3)
    planner, logits, results = Planner(shape), [], []
    try:
        for request in requests_of(changes):
            ran = drive(engine, planner, [request])
            logits.append(torch.stack(ran.logits[request.slot]))
            prefills = zip(ran.plans, ran.results, strict=True)
            results += [r for plan, rs in prefills if plan.sequences[0].count > 1 for r in rs]
    finally:
        engine.close()
    sparse = [one for result in results for one in result.sparse]
    names = ("read_pairs", "causal_pairs", "fetched_units", "remote_units", "fallbacks")
    counters = {name: sum(getattr(one, name) for one in sparse) for name in names}
    return Ran(logits, counters, sum(result.counters.sent_bytes for result in results))


def same(found: Ran, wanted: Ran) -> None:
    """Rows are multiplied in other company, so that sums round otherwise: a page that stood at the
    threshold may fall on its other side, and another in its place."""
    got, want = found.counters.pop("fetched_units"), wanted.counters["fetched_units"]
    assert found.counters.items() <= wanted.counters.items()
    assert abs(got - want) <= 0.02 * want
    bound = BOUND if got == want else 100 * BOUND
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert float((one - other).abs().max()) < bound


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
    flown, init = [], Flight.__init__

    def counted(self: Flight, *arguments: object) -> None:
        init(self, *arguments)
        flown.append(len(self.plans))

    monkeypatch.setattr(Flight, "__init__", counted)
    alone = run(kind, (0,) * len(hosts), page_size, False)
    together = run(kind, hosts, page_size, False)
    assert not flown
    in_flight = run(kind, hosts, page_size, True)
    assert flown and min(flown) > 1
    same(together, alone)
    same(in_flight, alone)
    assert alone.sent < together.sent < 1.1 * alone.sent  # questions
    assert abs(in_flight.sent - alone.sent) < 0.2 * alone.sent  # a last token shares with others


@pytest.mark.parametrize("changes", [{"max_tau": 0.1}, {"tail": "none"}, {"estimator": "quest"}])
def test_other_settings_fly_too(changes: dict[str, object]) -> None:
    same(run("llama", (0, 1), 64, True, **changes), run("llama", (0, 0), 64, False, **changes))

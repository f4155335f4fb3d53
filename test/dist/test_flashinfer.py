"""The engine with what FlashInfer is planned with computed literally: exact, planned once a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import check
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from test.kit.fake_flashinfer import FakeFlashInfer
from torch import Tensor

from sps_runtime.attention import flashinfer
from sps_runtime.attention.flashinfer import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops.dispatch import choose_ops

PAGES = 120
CASES = [
    ("llama", 1, "sharded", "pass_kv", None),
    ("llama", 2, "turns", "pass_kv", None),
    ("llama", 2, "sharded", "pass_kv", (0, 1)),
    ("llama", 3, "turns", "pass_q", None),
    ("window", 2, "turns", "ulysses", None),
    ("window", 1, "sharded", "pass_kv", None),
]


class Graph:
    """Work that runs again without planning anything: what a captured graph does."""

    def __init__(self, recorder: Graphs, work: Callable[[], Tensor]) -> None:
        self._recorder, self._work = recorder, work

    def replay(self) -> Tensor:
        library = self._recorder.library
        plans = len(library.plans)
        result = self._work()
        assert len(library.plans) == plans, "planned inside of a graph"
        self._recorder.replays += 1
        return result


class Graphs:
    """`ops.cuda_graphs.GraphRecorder` without a device."""

    padded = True

    def __init__(self, library: FakeFlashInfer) -> None:
        self.library, self.records, self.replays = library, 0, 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Graph]:
        self.records += 1
        return work(), Graph(self, work)


@pytest.mark.parametrize("kind", ["llama", "window"])
def test_graphs_replay_what_was_planned_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of three sequences run in a shape of four rows; tables change under the same graph,
    whose plan is kept however many others come."""
    monkeypatch.setattr(flashinfer, "REMEMBERED", 1)
    model, library = exact_model(kind), FakeFlashInfer()
    engine = ThreadEngine(
        model.config, model.arena(1, ops="torch"), page_size=16, pages_per_rank=PAGES,
        ops=choose_ops("torch"),
        make_backend=lambda: FlashInferBackend(library, TorchBackend(), torch.device("cpu")),
    )  # fmt: skip
    recorder = Graphs(library)
    engine.runners[0]._graphs._recorder = recorder
    shape = Shape(1, 16, PAGES, decode="sharded", overlap=False)
    requests = [Request(prompt(length), arrival=at) for length, at in ((151, 0), (15, 1), (64, 2))]
    try:
        run = drive(engine, Planner(shape), requests)
        check(kind, engine, shape, requests, run)
    finally:
        engine.close()
    assert recorder.records < 8 < recorder.replays
    assert set(engine.runners[0]._graphs._shapes) <= {((0,), "sharded", n) for n in (1, 2, 4)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "sp", "decode", "strategy", "hosts"), CASES)
def test_exact(kind: str, sp: int, decode: str, strategy: str, hosts: tuple[int, ...]) -> None:
    model = exact_model(kind)
    libraries: list[FakeFlashInfer] = []

    def make_backend() -> FlashInferBackend:
        libraries.append(FakeFlashInfer())
        return FlashInferBackend(libraries[-1], TorchBackend(), torch.device("cpu"))

    engine = ThreadEngine(
        model.config, model.arena(1, ops="torch"), sp=sp, page_size=16, pages_per_rank=PAGES,
        hosts=hosts, ops=choose_ops("torch"), make_backend=make_backend,
    )  # fmt: skip
    shape = Shape(sp, 16, PAGES, chunk=64, decode=decode, strategy=strategy, overlap=False, seed=sp)
    requests = [
        Request(prompt(151)),
        Request(prompt(15), arrival=2),
        Request(prompt(64), arrival=3, cancel_after=9),
    ]
    try:
        run = drive(engine, Planner(shape), requests)
        check(kind, engine, shape, requests, run)
    finally:
        engine.close()
    for library in libraries:
        # The same tables serve all layers: with two layers, each plan is run twice at least.
        assert len(library.plans) * model.config.num_layers <= len(library.runs)

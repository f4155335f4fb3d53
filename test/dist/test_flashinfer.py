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

from sps_runtime.attention.flashinfer import backend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.shared_prefix import ReadCost
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.distributed.threads import ThreadCommunicator
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


def make_engine(
    kind: str, sp: int, hosts: tuple[int, ...] | None
) -> tuple[ThreadEngine, list[FakeFlashInfer]]:
    """An engine whose ranks compute attention by stand-ins for FlashInfer, one a rank."""
    model = exact_model(kind)
    libraries: list[FakeFlashInfer] = []

    def make_backend() -> FlashInferBackend:
        libraries.append(FakeFlashInfer())
        return FlashInferBackend(libraries[-1], TorchBackend(), torch.device("cpu"))

    engine = ThreadEngine(
        model.config, model.arena(1, ops="torch"), sp=sp, page_size=16, pages_per_rank=PAGES,
        hosts=hosts, ops=choose_ops("torch"), make_backend=make_backend,
    )  # fmt: skip
    return engine, libraries


@pytest.mark.parametrize("kind", ["llama", "window"])
def test_graphs_replay_what_was_planned_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of three sequences run in a shape of four rows; tables change under the same graph,
    whose plan is kept however many others come."""
    monkeypatch.setattr(backend, "REMEMBERED", 1)
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


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize(("sp", "hosts"), [(1, None), (2, None), (2, (0, 1))])
def test_branches_behind_one_prefix(
    sp: int, hosts: tuple[int, ...] | None, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches of a program decode behind the pages of its prompt, some of them longer than others,
    beside requests with a prompt of their own."""
    if graphs and sp > 1:
        pytest.skip("graphs are of one rank")
    free = ReadCost(1)  # these pages are small beside what their rows cost
    monkeypatch.setattr(backend, "read_cost", lambda *_: free)
    engine, libraries = make_engine("llama", sp, hosts)
    recorder = Graphs(libraries[0])
    if graphs:
        engine.runners[0]._graphs._recorder = recorder
    shape = Shape(sp, 16, PAGES, decode="turns", overlap=False)
    program = prompt(151)
    branches = [
        Request(program[:length] + prompt(more, seed=seed), prefix_of=None, arrival=seed)
        for seed, (length, more) in enumerate([(151, 0), (15, 1)])
    ]
    branches += [
        Request(program[:cut] + prompt(7, seed=seed), arrival=6, prefix_of=branches[0])
        for seed, cut in ((2, 150), (3, 150), (4, 70))
    ]
    try:
        run = drive(engine, Planner(shape), branches)
        check("llama", engine, shape, branches, run)
    finally:
        engine.close()
    kinds = [plan["kind"] for library in libraries for plan in library.plans]
    shared = [
        plan for library in libraries for plan in library.plans
        if plan["kind"] == "prefill" and not plan["causal"] and plan["qo_indptr"][1] > 1
    ]  # fmt: skip
    assert "decode" in kinds and len(shared) > 8
    if graphs:
        forms = {form for kept in engine.runners[0]._graphs._shapes.values()
                 for form in kept.recordings}  # fmt: skip
        assert forms == {("decode",), ("decode+shared",)}
        assert recorder.records < 12 < recorder.replays


def test_graphs_of_tensor_parallel_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each captures its part, exchanges included; both replay the same steps in the same order."""
    monkeypatch.setattr(ThreadCommunicator, "recordable", True)  # as NCCL's
    model = exact_model("llama")
    libraries: list[FakeFlashInfer] = []

    def make_backend() -> FlashInferBackend:
        libraries.append(FakeFlashInfer())
        return FlashInferBackend(libraries[-1], TorchBackend(), torch.device("cpu"))

    engine = ThreadEngine(
        model.config, model.arena(2, ops="torch"), tp=2, arch="tp", page_size=16,
        pages_per_rank=PAGES, ops=choose_ops("torch"), make_backend=make_backend,
    )  # fmt: skip
    recorders = [Graphs(library) for library in libraries]
    for runner, recorder in zip(engine.runners, recorders, strict=True):
        runner._graphs._recorder = recorder
    shape = Shape(1, 16, PAGES, decode="sharded", overlap=False)
    requests = [Request(prompt(length), arrival=at) for length, at in ((151, 0), (15, 1), (64, 2))]
    try:
        run = drive(engine, Planner(shape), requests)
        check("llama", engine, shape, requests, run)
    finally:
        engine.close()
    found = {(recorder.records, recorder.replays) for recorder in recorders}
    assert len(found) == 1
    ((records, replays),) = found
    assert records < 8 < replays


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "sp", "decode", "strategy", "hosts"), CASES)
def test_exact(kind: str, sp: int, decode: str, strategy: str, hosts: tuple[int, ...]) -> None:
    engine, libraries = make_engine(kind, sp, hosts)
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
        assert len(library.plans) * exact_model(kind).config.num_layers <= len(library.runs)

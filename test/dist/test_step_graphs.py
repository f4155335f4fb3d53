"""Replayed decode steps give the bits and count the bytes of steps that run the model's code."""

from __future__ import annotations

import copy

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import Run, ThreadEngine, drive

from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.recording import Recording
from sps_runtime.runner.step_graph import StepGraphs
from sps_runtime.telemetry.timeline import NoTimeline

PAGES = 120
kernels = pytest.mark.skipif(choose_ops().kernels is None, reason="replays need the kernels")
pytestmark = kernels


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def requests() -> list[Request]:
    """Contexts that grow over several pages while others come and go, so that rows change; pages
    in common; one that is dropped, whose pages others write again."""
    long = Request(prompt(70, seed=1), 60)
    return [
        long,
        Request(prompt(15, seed=2), 40, arrival=5),
        Request(prompt(33, seed=3), 20, arrival=9, cancel_after=8),
        Request(prompt(1, seed=4), 30, arrival=14),
        Request(long.prompt[:64] + prompt(5, seed=5), 20, arrival=20, prefix_of=long),
    ]


def run_once(
    kind: str, sp: int, tp: int, dtype: str, record: bool, decode: str
) -> tuple[Run, list[StepGraphs]]:
    model = exact_model(kind)
    engine = ThreadEngine(
        model.config,
        model.arena(tp, dtype),
        sp=sp,
        tp=tp,
        page_size=16,
        pages_per_rank=PAGES,
        record=record,
    )
    shape = Shape(sp, 16, PAGES, chunk=64, decode=decode, overlap=False, seed=sp)
    try:
        run = drive(engine, Planner(shape), copy.deepcopy(requests()))
    finally:
        engine.close()
    return run, [runner._graphs for runner in engine.runners]


CASES = [
    ("llama", 1, 1, "sharded"),
    ("llama", 2, 1, "replicated"),
    ("qwen3", 1, 1, "sharded"),
    ("qwen3", 2, 1, "replicated"),
    ("qwen3", 2, 2, "replicated"),
    ("window", 1, 2, "sharded"),
    ("window", 2, 1, "replicated"),
    ("window", 3, 1, "replicated"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "sp", "tp", "decode"), CASES)
def test_bits_and_bytes(kind: str, sp: int, tp: int, decode: str, dtype: str) -> None:
    replayed, graphs = run_once(kind, sp, tp, dtype, True, decode)
    computed, plain = run_once(kind, sp, tp, dtype, False, decode)
    for graph in graphs:
        shapes = list(graph._shapes.values())
        assert len(shapes) > 2
        found = [recording for shape in shapes for recording in shape.recordings.values()]
        assert len(found) == len(shapes) and all(isinstance(one, Recording) for one in found)
    assert not any(shape.recordings for graph in plain for shape in graph._shapes.values())
    assert replayed.plans == computed.plans, "a token differed"
    for slot, logits in computed.logits.items():
        assert torch.equal(torch.stack(replayed.logits[slot]), torch.stack(logits))
    for mine, theirs in zip(replayed.results, computed.results, strict=True):
        for a, b in zip(by_rank(mine), by_rank(theirs), strict=True):
            assert counts(a.counters) == counts(b.counters)


class Spans(NoTimeline):
    """A timeline that keeps what was timed elsewhere."""

    on = True

    def __init__(self) -> None:
        self.found: list[tuple[str, int, int]] = []

    def add(self, name: str, category: str, began_ns: int, ended_ns: int) -> None:
        self.found.append((name, began_ns, ended_ns))


def test_a_timeline_sees_the_calls_of_a_replay() -> None:
    _, (graph,) = run_once("llama", 1, 1, "float32", True, "sharded")
    (recording,) = next(iter(graph._shapes.values())).recordings.values()
    assert isinstance(recording, Recording)
    expected = recording.replay().clone()
    graph._timeline = spans = Spans()
    assert torch.equal(graph._replayed(recording), expected)
    assert len(spans.found) == len(recording) and "attention" in {name for name, *_ in spans.found}
    edges = [at for _, began, ended in spans.found for at in (began, ended)]
    assert edges == sorted(edges)


def by_rank(results: list) -> list:
    return sorted(results, key=lambda result: result.rank)


def counts(counters: object) -> tuple:
    names = ("sent_bytes", "linear_bytes", "physical_bytes", "token_layers")
    return tuple(getattr(counters, name) for name in names)

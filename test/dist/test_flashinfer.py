"""The engine with FlashInfer's planning arguments computed literally: exact, planned once a step."""

from __future__ import annotations

import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import check
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from test.kit.fake_flashinfer import FakeFlashInfer

import pytest

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

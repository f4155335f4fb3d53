"""Sparse attention that leaves nothing out says what exact attention says, token by token."""

from __future__ import annotations

import pytest
import torch
from test.dist.helpers.exact_models import exact_model
from test.dist.helpers.exactness import check, check_tokens, requests_of_a_cell
from test.dist.helpers.planner import Planner, Shape
from test.dist.helpers.process_engine import ProcessEngine
from test.dist.helpers.thread_engine import ThreadEngine, drive

from sps_runtime.types.attention import AttentionSpec, SparseSettings

EVERYTHING = SparseSettings(
    tau=0.0, budget=1.0, rows=4, block=64, superblock=128, wide_from=512
)
CELLS = [
    (1, 1, 16, "llama", True),
    (2, 1, 64, "qwen3", True),
    (3, 1, 16, "window", False),
    (2, 2, 16, "qwen3", False),
    (4, 1, 64, "llama", True),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS, ids=["-".join(map(str, cell)) for cell in CELLS])
def test_leaving_nothing_out_is_exact(cell: tuple) -> None:
    """Beside exact requests, with all chunk sizes, shared prefixes and recorded decode steps."""
    sp, tp, page_size, kind, record = cell
    model, pages = exact_model(kind), 1200 if page_size == 16 else 400
    engine = ThreadEngine(
        model.config, model.arena(tp), sp=sp, tp=tp, page_size=page_size,
        pages_per_rank=pages, record=record,
    )  # fmt: skip
    requests = requests_of_a_cell(page_size)
    for index, request in enumerate(requests):
        source = request.prefix_of
        if (source.attention.sparse is not None) if source else index % 4:
            request.attention = AttentionSpec("csa", EVERYTHING)
    shape = Shape(sp, page_size, pages, dealing="random", seed=sp)
    try:
        run = drive(engine, Planner(shape), requests)
        check(kind, engine, shape, requests, run)
    finally:
        engine.close()
    counters = [one for results in run.results for r in results for one in r.sparse]
    assert bool(counters) == (kind != "window")  # its layers all have one
    assert all(one.read_pairs == one.causal_pairs for one in counters)


@pytest.mark.timeout(400)
def test_processes_share_their_summaries() -> None:
    engine = ProcessEngine(
        exact_model("qwen3").directory, sp=2, page_size=64, pages_per_rank=300
    )
    try:
        requests = requests_of_a_cell(64)[3:9]
        for request in requests:
            request.attention = AttentionSpec("csa", EVERYTHING)
        run = drive(engine, Planner(Shape(2, 64, 300, dealing="random", seed=1)), requests)
        check_tokens("qwen3", requests)
        assert engine.stop() == [0, 0]
    finally:
        engine.close()
    counters = [one for results in run.results for r in results for one in r.sparse]
    assert sum(one.remote_bytes for one in counters) > 0

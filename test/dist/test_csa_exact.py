"""Sparse attention in models: what leaves nothing out says what exact attention says, and what does
leave something out says the same at every degree and in every chunking."""

from __future__ import annotations

import msgspec
import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import check, check_tokens, requests_of_a_cell
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.process_engine import ProcessEngine
from test.dist.helpers.thread_engine import ThreadEngine, drive

from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings

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


CHOOSING = SparseSettings(
    tau=0.02, budget=0.25, minimum=4, rows=8, block=64, superblock=128, wide_from=512
)
LENGTHS, NEW = (1037, 700, 513), 12


def logits(
    spec: AttentionSpec, sp: int, tp: int, chunk: int, forced: list[list[int]] | None
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """What each prompt is continued with, and all logits."""
    model = exact_model("qwen3")
    engine = ThreadEngine(
        model.config, model.arena(tp), sp=sp, tp=tp, page_size=16, pages_per_rank=800
    )
    requests = [
        Request(prompt(length), NEW, chunk=chunk, attention=spec, forced=tokens)
        for length, tokens in zip(LENGTHS, forced or [None] * 3, strict=True)
    ]
    try:
        run = drive(engine, Planner(Shape(sp, 16, 800, dealing="random", seed=chunk)), requests)
    finally:
        engine.close()
    return [r.sampled for r in requests], [torch.stack(run.logits[r.slot]) for r in requests]


@pytest.mark.parametrize("decode", ["exact", "sparse"])
def test_choices_are_the_same_at_every_degree(decode: str) -> None:
    spec = AttentionSpec("csa", msgspec.structs.replace(CHOOSING, decode=decode))
    tokens, alone = logits(spec, 1, 1, 0, None)
    _, exact = logits(EXACT, 1, 1, 0, tokens)
    gap = max(float((a - b).abs().max()) for a, b in zip(alone, exact, strict=True))
    assert gap > 0.05, "nothing was left out"
    for sp, tp, chunk in ((3, 1, 256), (2, 2, 128), (4, 1, 0)):
        _, found = logits(spec, sp, tp, chunk, tokens)
        for one, other in zip(alone, found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=0)

"""The same greedy tokens at every degree: the whole matrix, ranks as threads of this process.

Every cell runs all chunk sizes, cold and warm, with requests that come and go, in one batch. Every
fifth runs without the kernels, and another computes decode steps without replaying them.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test.dist.helpers.exact_models import KINDS, exact_model
from test.dist.helpers.exactness import TIGHT_PAGES, check, requests_of_a_cell, truth
from test.dist.helpers.planner import Planner, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive

from sps_runtime.ops.dispatch import choose_ops

DEALINGS = ("zigzag", "contiguous", "random")
MODELS = ("llama", "qwen3", "window")
CELLS = [
    (sp, tp, strategy, arch, page_size)
    for sp, tp, strategy, arch, page_size in product(
        (1, 2, 3, 4), (1, 2), ("pass_kv", "pass_q", "ulysses"), ("ntp", "tp"), (16, 64)
    )
    if sp > 1 or (strategy, arch) == ("pass_kv", "ntp")
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ties"])
def test_the_reference_follows_transformers(kind: str) -> None:
    """The one-rank engine's own logits, token by token, against transformers' in one pass."""
    model = exact_model(kind)
    for request in requests_of_a_cell(16)[3:9]:
        expected = truth(kind, tuple(request.prompt))
        ids = torch.tensor([request.prompt + expected.tokens])
        with torch.inference_mode():
            logits = model.oracle(ids).logits[0, len(request.prompt) - 1 : -1]
        assert (logits - expected.logits_NV).abs().max() < 1e-4
        assert logits.std() > 0.5, "a model that says nothing shows nothing"


@pytest.mark.parametrize(
    ("index", "cell"), list(enumerate(CELLS)), ids=["-".join(map(str, cell)) for cell in CELLS]
)
def test_cell(index: int, cell: tuple) -> None:
    sp, tp, strategy, arch, page_size = cell
    kind, ops = MODELS[index % len(MODELS)], "torch" if index % 5 == 4 else "auto"
    model, pages = exact_model(kind), TIGHT_PAGES[page_size]
    engine = ThreadEngine(
        model.config,
        model.arena(tp, ops=ops),
        sp=sp,
        tp=tp,
        arch=arch,
        page_size=page_size,
        pages_per_rank=pages,
        ops=choose_ops(ops),
        record=index % 5 != 3,
    )
    shape = Shape(
        sp,
        page_size,
        pages,
        dealing=DEALINGS[index // 2 % 3],
        strategy=strategy,
        seed=index,
    )
    requests = requests_of_a_cell(page_size)
    try:
        run = drive(engine, Planner(shape), requests)
        check(kind, engine, shape, requests, run)
    finally:
        engine.close()

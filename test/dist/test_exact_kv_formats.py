"""Quantised KV changes the answer, but the same way at every degree, chunking and on every host.

Rounding to a step happens where keys and values are written. Other degrees sum in other orders, and
where a last bit puts a number on the other side of half a step, one element of one row moves by a
step: so logits agree to a step's worth, and tokens wherever the reference's margin is larger.
"""

from __future__ import annotations

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import first_difference
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import ThreadEngine, drive
from test.dist.step_case import StepCase
from torch import Tensor

from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops.dispatch import choose_ops

PAGES = 200
LENGTHS = (1, 15, 16, 150, 400)
NEW_TOKENS = 16
MARGIN = 2e-2
DEGREES = [
    (1, 1, "pass_kv", None, "torch"),
    (2, 1, "pass_kv", None, "auto"),
    (2, 2, "pass_q", None, "auto"),
    (3, 1, "ulysses", None, "torch"),
    (2, 1, "pass_kv", (0, 1), "auto"),
    (3, 1, "ulysses", (0, 0, 1), "auto"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def answers(
    kv_dtype: str, sp: int, tp: int, strategy: str, hosts: tuple | None, ops: str, chunk: int
) -> list[tuple[list[int], Tensor]]:
    model = exact_model("llama")
    engine = ThreadEngine(
        model.config, model.arena(tp, ops=ops), sp=sp, tp=tp, hosts=hosts, page_size=16,
        pages_per_rank=PAGES, ops=choose_ops(ops), kv_dtype=kv_dtype,
    )  # fmt: skip
    requests = [Request(prompt(length), NEW_TOKENS, chunk=chunk) for length in LENGTHS]
    try:
        run = drive(engine, Planner(Shape(sp, 16, PAGES, strategy=strategy)), requests)
    finally:
        engine.close()
    return [(request.sampled, torch.stack(run.logits[request.slot])) for request in requests]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_same_tokens_at_every_degree_and_chunking(kv_dtype: str) -> None:
    whole = answers(kv_dtype, 1, 1, "pass_kv", None, "auto", 0)
    native = answers("auto", 1, 1, "pass_kv", None, "auto", 0)
    moved = [float((a[1][0] - b[1][0]).abs().max()) for a, b in zip(whole, native, strict=True)]
    assert max(moved) > 1e-3, "nothing was quantised"
    for index, degree in enumerate(DEGREES):
        got = answers(kv_dtype, *degree, chunk=(64, 0, 33)[index % 3])
        for (tokens, logits), (wanted, expected) in zip(got, whole, strict=True):
            same = first_difference(tokens, wanted)
            error = (logits[: same + 1] - expected[: same + 1]).abs().max()
            assert error < MARGIN, (degree, error)
            if same < NEW_TOKENS:
                first, second = expected[same].topk(2).values.tolist()
                assert first - second < MARGIN, (degree, same)


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
@pytest.mark.parametrize("hosts", [None, (0, 1, 1)])
@pytest.mark.parametrize("kernels", [False, True])
def test_steps(kv_format: str, strategy: str, hosts: tuple | None, kernels: bool) -> None:
    backend = (
        KernelBackend(pytest.importorskip("sps_kernel")) if kernels else TorchBackend()
    )
    StepCase(
        [(70, 30), (0, 50), (33, 1)], strategy=strategy, sp=3, lay="random", window=40,
        hosts=hosts, backend=backend, kv_format=kv_format,
    ).run()  # fmt: skip

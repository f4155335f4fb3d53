"""The pool of threads: every task runs once, whoever looks or sleeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import sps_kernel as sk


@pytest.fixture(params=[0.0, 20e-6, 5e-3])
def spin(request: pytest.FixtureRequest) -> Iterator[float]:
    sk.set_pool_spin(request.param)
    yield request.param
    sk.set_pool_spin(0.0)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_many_short_calls(spin: float, threads: int) -> None:
    x, w = torch.randn(2, 64), torch.randn(640, 64)
    wanted = sk.small_gemm(x, w)
    out = torch.empty_like(wanted)
    for _ in range(300):
        out.fill_(torch.nan)
        sk.small_gemm(x, w, out=out, threads=threads)
        assert torch.equal(out, wanted)


def test_callers_that_find_the_pool_taken_work_alone(spin: float) -> None:
    x, w = torch.randn(2, 64), torch.randn(640, 64)
    wanted = sk.small_gemm(x, w)
    wrong = []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(sk.small_gemm(x, w, threads=2), wanted):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.parametrize("seconds", [-1.0, 1.0, float("nan")])
def test_a_spin_is_a_short_time(seconds: float) -> None:
    with pytest.raises(ValueError):
        sk.set_pool_spin(seconds)

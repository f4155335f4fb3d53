"""Recorded programs: a replay equals a direct run on changed inputs, and misuse is refused."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import torch

import sps_kernel as sk
from sps_kernel import Program

HEADS, DIM, PAGE, TOKENS = 2, 16, 16, 3


class Layer:
    """Every kernel of a decode layer over buffers of its own."""

    def __init__(self, dtype: torch.dtype, threads: int = 1) -> None:
        hidden = HEADS * DIM
        self.threads = threads
        self.x = torch.randn(TOKENS, hidden).to(dtype)
        self.w = torch.randn(3 * hidden, hidden).to(dtype)
        self.bias = torch.randn(3 * hidden).to(dtype)
        self.norm = torch.rand(hidden).to(dtype)
        self.table = torch.randn(64, DIM)
        self.k = torch.randn(4, HEADS, PAGE, DIM).to(dtype)
        self.v = torch.randn(4, HEADS, PAGE, DIM).to(dtype)
        self.residual = torch.zeros(TOKENS, hidden, dtype=dtype)
        self.pools = sk.KVPools([self.k], [self.v])
        self.positions = torch.zeros(TOKENS, dtype=torch.int32)
        self.slots = torch.zeros(TOKENS, dtype=torch.int32)
        self.offsets = torch.zeros(TOKENS, dtype=torch.int32)
        self.items = torch.zeros(TOKENS, 8, dtype=torch.int32)
        self.pages = torch.zeros(8, dtype=torch.int32)
        self.places = torch.zeros(8, dtype=torch.int32)

    def refill(self, step: int) -> None:
        """Other inputs: tokens at positions 10 + step, pages 3, then 1."""
        self.x.copy_(torch.randn(self.x.shape, generator=torch.Generator().manual_seed(step)))
        self.residual.fill_(step)
        position = 10 + 3 * step
        for row in range(TOKENS):
            at = position + row
            self.positions[row] = at
            self.slots[row] = (3, 1)[at // PAGE]
            self.offsets[row] = at % PAGE
            pages = at // PAGE + 1
            item = (row, 1, at, 0, pages, position + TOKENS, 0, HEADS)
            self.items[row] = torch.tensor(item, dtype=torch.int32)
        self.pages[:2] = torch.tensor([3, 1])
        self.places[:2] = torch.tensor([0, PAGE])

    def forward(self) -> torch.Tensor:
        shape = (TOKENS, HEADS, DIM)
        normed = sk.rms_norm(self.x, self.norm, 1e-6, threads=self.threads)
        fused = sk.small_gemm(normed, self.w, self.bias, threads=self.threads)
        q, k, v = (part.unflatten(-1, (HEADS, DIM)) for part in fused.chunk(3, dim=-1))
        sk.rope_kv_write(
            q, k, v, self.positions, self.table, self.k, self.v, self.slots, self.offsets,
            threads=self.threads,
        )  # fmt: skip
        o, lse = torch.empty(shape), torch.empty(shape[:2])
        sk.paged_attention(
            q, self.pools, self.items, self.pages, self.places, out=o, lse=lse,
            threads=self.threads,
        )  # fmt: skip
        merged, _ = sk.merge_n_states([o, o], [lse, lse], out=torch.empty(shape, dtype=q.dtype))
        flat = merged.flatten(1)
        sk.rms_norm(flat, self.norm, 1e-6, residual=self.residual, out=flat)
        return sk.silu_mul(flat, flat)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_replay_is_the_direct_run_on_other_inputs(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(1)
    recorded = Layer(dtype, threads)
    torch.manual_seed(1)
    direct = Layer(dtype, threads)
    recorded.refill(0), direct.refill(0)
    program = Program()
    with program.recording():
        out = recorded.forward()
    assert torch.equal(out, direct.forward())
    for step in range(1, 4):
        recorded.refill(step), direct.refill(step)
        wanted = direct.forward()
        program.run()
        assert torch.equal(recorded.k, direct.k) and torch.equal(recorded.v, direct.v)
        assert torch.equal(out, wanted)
    assert len(program) == 7


def test_outputs_follow_inputs_exactly() -> None:
    x, w = torch.randn(2, 8), torch.randn(16, 8)
    program = Program()
    with program.recording():
        y = sk.silu_mul(sk.small_gemm(x, w), sk.small_gemm(x, w))
    for _ in range(3):
        x.normal_()
        program.run()
        assert torch.equal(y, sk.silu_mul(sk.small_gemm(x, w), sk.small_gemm(x, w)))


def test_a_profiled_replay_computes_the_same_and_times_each_call() -> None:
    x, w = torch.randn(2, 8), torch.randn(16, 8)
    program = Program()
    with program.recording():
        y = sk.silu_mul(sk.small_gemm(x, w), sk.small_gemm(x, w))
    assert program.names == ["small_gemm", "small_gemm", "silu_mul"]
    x.normal_()
    clock = torch.zeros(4, dtype=torch.int64)
    before = time.monotonic_ns()
    program.run(clock)
    times = [before, *clock.tolist(), time.monotonic_ns()]
    assert times == sorted(times)
    assert torch.equal(y, sk.silu_mul(sk.small_gemm(x, w), sk.small_gemm(x, w)))
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="clock_ns"):
            program.run(wrong)


def test_arrays_that_only_the_program_knows_stay_alive() -> None:
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    program = Program()

    def record() -> np.ndarray:
        w = np.full((512, 256), 2.0, np.float32)
        bias = np.full(512, 1.0, np.float32)
        with program.recording():
            return sk.rms_norm(sk.small_gemm(x, w, bias), np.ones(512, np.float32), 0.0)

    y = record()
    gc.collect()
    others = [np.full((512, 256), np.nan, np.float32) for _ in range(8)]
    x[:] = 3.0
    program.run()
    np.testing.assert_allclose(y, 1.0, rtol=1e-6)
    assert len(others) == 8


def test_pools_stay_alive() -> None:
    layer = Layer(torch.float32)
    layer.refill(0)
    program = Program()
    with program.recording():
        layer.forward()
    layer.pools = None
    gc.collect()
    program.run()


def test_a_workspace_is_kept_whole_and_its_arrays_are_not() -> None:
    space = np.zeros(1024, np.float32)
    freed = threading.Event()

    class Watched(np.ndarray):
        def __del__(self) -> None:
            freed.set()

    program = Program()
    program.add_workspace(space)
    x, w = np.ones((1, 8), np.float32), np.ones((16, 8), np.float32)
    with program.recording():
        y = space[:16].reshape(1, 16).view(Watched)
        sk.small_gemm(x, w, out=y)
        del y
        assert freed.is_set()
    x[:] = 2.0
    program.run()
    assert (space[:16] == 16.0).all()


def test_other_threads_are_not_recorded() -> None:
    program = Program()
    x, w = torch.randn(1, 8), torch.randn(16, 8)
    with program.recording():
        thread = threading.Thread(target=sk.small_gemm, args=(x, w))
        thread.start()
        thread.join()
        sk.small_gemm(x, w)
    assert len(program) == 1


def test_two_threads_record_apart() -> None:
    first, second = Program(), Program()
    x, w = torch.randn(1, 8), torch.randn(16, 8)

    def record() -> None:
        with second.recording():
            sk.small_gemm(x, w)
            sk.small_gemm(x, w)

    with first.recording():
        thread = threading.Thread(target=record)
        thread.start()
        thread.join()
        sk.small_gemm(x, w)
    assert (len(first), len(second)) == (1, 2)


def test_nested_recording_is_refused_and_leaves_the_outer_one_usable() -> None:
    x, w = torch.randn(1, 8), torch.randn(16, 8)
    outer, inner = Program(), Program()
    with outer.recording():
        with pytest.raises(RuntimeError, match="recording already"), inner.recording():
            pass
        with pytest.raises(RuntimeError, match="cannot run"):
            outer.run()
        sk.small_gemm(x, w)
    assert len(outer) == 1
    outer.run()


def test_a_program_is_recorded_once_and_runs_only_then() -> None:
    program = Program()
    with pytest.raises(RuntimeError, match="not recorded"):
        program.run()
    with program.recording():
        pass
    with pytest.raises(RuntimeError, match="once"), program.recording():
        pass
    program.run()


def test_a_failed_recording_is_thrown_away() -> None:
    x, w = torch.randn(1, 8), torch.randn(16, 8)
    program = Program()
    with pytest.raises(KeyError), program.recording():
        sk.small_gemm(x, w)
        raise KeyError("body")
    assert not program.recorded and len(program) == 0
    with pytest.raises(RuntimeError):
        program.run()
    with Program().recording():  # the thread is free again
        pass


def test_what_cannot_be_recorded_says_so() -> None:
    words = np.zeros(1, np.int64)
    for call in (
        lambda: sk.sample(torch.randn(8), 0.5),
        lambda: sk.publish(words, 0, 1),
        lambda: sk.wait_at_least(words, 0, 0),
    ):
        program = Program()
        with pytest.raises(RuntimeError, match="cannot be recorded"), program.recording():
            call()


def test_index_values_are_checked_in_every_run() -> None:
    layer = Layer(torch.float32)
    layer.refill(0)
    program = Program()
    with program.recording():
        layer.forward()
    layer.slots[0] = 99
    with pytest.raises(ValueError, match=r"slots\[0\] = 99"):
        program.run()
    layer.slots[0] = 0
    layer.pages[0] = 77
    with pytest.raises(ValueError, match="page id"):
        program.run()
    layer.pages[0] = 3
    program.run()  # an error leaves the program usable


def test_an_instruction_set_chosen_later_is_used(isa: str) -> None:
    x, w = torch.randn(2, 64), torch.randn(32, 64)
    program = Program()
    with program.recording():
        y = sk.small_gemm(x, w)
    x.normal_()
    program.run()
    assert torch.equal(y, sk.small_gemm(x, w))

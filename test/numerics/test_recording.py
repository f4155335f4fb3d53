"""Recordings see what torch computes, share memory, and give what the work would."""

from __future__ import annotations

import gc

import pytest
import torch

from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.recording import Recorder, Recording, Workspace
from sps_runtime.ops.weight import PlainWeight

OPS = choose_ops()
pytestmark = pytest.mark.skipif(OPS.kernels is None, reason="recordings are of kernels")


def recorder() -> Recorder:
    assert OPS.kernels is not None
    return Recorder(OPS.kernels)


def work(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Eight layers, so that memory is used again."""
    ops = OPS.operators
    for _ in range(8):
        y = ops.linear(x, PlainWeight(w))
        first, second = y.chunk(2, dim=-1)
        x = ops.moves.beside([ops.silu_mul(second, first), second])
    return x


def test_a_replay_is_the_work() -> None:
    x, w = torch.randn(3, 64), torch.randn(64, 64) / 6
    result, recording = recorder().record(lambda: work(x, w))
    assert isinstance(recording, Recording) and len(recording) == 32
    assert torch.equal(result, work(x, w))
    for _ in range(3):
        x.normal_()
        assert torch.equal(recording.replay(), work(x, w))


def test_dropped_results_give_their_memory_back() -> None:
    made = recorder()
    x, w = torch.randn(16, 4096), torch.randn(4096, 4096) / 64
    _, recording = made.record(lambda: work(x, w))
    assert isinstance(recording, Recording)
    layer = 16 * 4096 * 4
    assert made.workspace.nbytes < 8 * 3 * layer, "24 results of that size were made"
    before = made.workspace.nbytes
    again = [made.record(lambda: work(x, w))[1] for _ in range(3)]
    assert made.workspace.nbytes == before, "recordings share their memory"
    expected = work(x, w)
    for each in (recording, *again):
        assert isinstance(each, Recording) and torch.equal(each.replay(), expected)


def test_recordings_of_several_shapes_take_turns() -> None:
    made, w = recorder(), torch.randn(64, 64) / 6
    inputs = [torch.randn(rows, 64) for rows in (1, 5, 2)]
    recordings = [made.record(lambda x=x: work(x, w))[1] for x in inputs]
    gc.collect()
    for _ in range(2):
        for x, recording in zip(inputs, recordings, strict=True):
            x.normal_()
            assert isinstance(recording, Recording)
            assert torch.equal(recording.replay(), work(x, w))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: x.to(torch.bfloat16),
        lambda x: x.clone(),
        lambda x: x.t().contiguous(),
        lambda x: x.new_zeros(2, 2),
        lambda x: x.mul_(2),
        lambda x: torch.cat((x, x)),
        lambda x: x[torch.tensor([0])],
        lambda x: x * float(x[0, 0].item()),
    ],
)
def test_what_torch_computes_is_noticed(compute: object) -> None:
    x, w = torch.randn(3, 64), torch.randn(64, 64) / 6
    expected = compute(work(x.clone(), w))  # type: ignore[operator]
    result, why = recorder().record(lambda: compute(work(x, w)))  # type: ignore[operator]
    assert isinstance(why, str) and "aten." in why
    torch.testing.assert_close(result, expected)


def test_views_and_empty_tensors_are_no_computing() -> None:
    x, w = torch.randn(4, 64), torch.randn(64, 64) / 6

    def views() -> torch.Tensor:
        y = work(x.view(2, 2, 64).flatten(0, 1)[1:3].detach(), w)
        out = torch.empty_like(y)
        return OPS.operators.moves.copy_(out, y.unflatten(-1, (8, 8)).flatten(1))

    result, recording = recorder().record(views)
    assert isinstance(recording, Recording)
    assert torch.equal(result, work(x[1:3], w))


def test_a_value_taken_out_cannot_be_recorded() -> None:
    kernels = OPS.kernels
    assert kernels is not None
    x, w = torch.randn(1, 64), torch.randn(64, 64) / 6

    def taking() -> torch.Tensor:
        y = work(x, w)
        kernels.sample(y[0], 0.5)
        return y

    result, why = recorder().record(taking)
    assert why == "sample cannot be recorded"
    assert torch.equal(result, work(x, w))


def test_what_the_work_raises_is_raised() -> None:
    def failing() -> torch.Tensor:
        raise ConnectionError("a peer is gone")

    made = recorder()
    with pytest.raises(ConnectionError):
        made.record(failing)
    x, w = torch.randn(1, 64), torch.randn(64, 64) / 6
    assert isinstance(made.record(lambda: work(x, w))[1], Recording)


def test_a_workspace_hands_out_what_was_dropped() -> None:
    space = Workspace()
    space.begin()
    first = space.empty(torch.Size((3, 5)), torch.float32)
    view = first[1:]
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    assert space.empty(torch.Size((3, 5)), torch.float32).data_ptr() != address, "a view lives"
    del view
    assert space.empty(torch.Size((15,)), torch.float32).data_ptr() == address

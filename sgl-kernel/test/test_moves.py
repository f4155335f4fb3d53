"""Copies, look-ups, sums over ranks and angles, against torch: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sps_kernel import Program, add, copy, look_up, rope_angles, sum_parts

FLOATS = [torch.float32, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(*shape).to(dtype)
    x.view(-1)[::7] = (
        torch.tensor([torch.nan, torch.inf, -0.0, 1e-40])
        .repeat(x.numel() // 28 + 1)[: len(x.view(-1)[::7])]
        .to(dtype)
    )
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_copy(of: torch.dtype, to: torch.dtype) -> None:
    x = noise(5, 6, 40, dtype=of)
    for src, shape in ((x, x.shape), (x[1:4, 2:5, 3:36], (3, 3, 33)), (x[:0], (0, 6, 40))):
        out = torch.full(shape, 3.0).to(to)
        assert same(copy(src, out), src.to(to))
    wide = torch.full((5, 90), 3.0).to(to)
    copy(x[:, 2, :], wide[:, 50:])
    assert same(wide[:, 50:], x[:, 2].to(to)) and bool((wide[:, :50] == 3.0).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_add(dtype: torch.dtype) -> None:
    x, y = noise(5, 6, 40, dtype=dtype), noise(5, 6, 40, dtype=dtype)
    for src, out in ((x, y), (x[1:4, 2:5, 3:36], y[:3, 1:4, 7:]), (x[:, 1], y[:, 5])):
        wanted = (out.float() + src.float()).to(dtype)
        assert same(add(src, out), wanted)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_look_up(dtype: torch.dtype, ids: torch.dtype) -> None:
    table = noise(50, 33, dtype=dtype)
    index = torch.tensor([49, 0, 7, 7], dtype=ids)
    assert same(look_up(index, table), table[index.long()])
    assert same(look_up(index, table[:, 3:20]), table[index.long(), 3:20])
    assert look_up(index[:0], table).shape == (0, 33)


def test_a_bad_id_is_refused_in_every_run() -> None:
    table, ids = torch.randn(5, 4), torch.tensor([0, 4])
    program = Program()
    with program.recording():
        look_up(ids, table)
    for bad in (5, -1, 2**40):
        ids[1] = bad
        with pytest.raises(ValueError, match=rf"ids\[1\] = {bad}"):
            program.run()
        with pytest.raises(ValueError):
            look_up(ids, table)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_parts(dtype: torch.dtype, parts: int) -> None:
    x = torch.randn(parts, 3, 700).to(dtype)
    total = x[0].float()
    for part in x[1:]:
        total = total + part.float()
    assert torch.equal(sum_parts(x), total.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rope_angles(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 17, 8191, 131071], dtype=dtype)
    frequencies = 1.0 / 1e6 ** (torch.arange(0, 64, 2) / 64)
    got = rope_angles(positions, frequencies, 1.25)
    angles = (positions.float()[:, None] * frequencies).double()
    wanted = 1.25 * torch.cat((angles.cos(), angles.sin()), dim=-1)
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=2e-7)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, 4)
    for call in (
        lambda: copy(x, torch.zeros(3, 5)),
        lambda: copy(x, torch.zeros(3, 4, dtype=torch.float64)),
        lambda: add(x, x.bfloat16()),
        lambda: copy(x.T, torch.zeros(4, 3)),
        lambda: look_up(torch.zeros(2), x),
        lambda: look_up(torch.zeros(2, dtype=torch.int32), x, out=torch.zeros(2, 5)),
        lambda: sum_parts(x.bfloat16(), out=torch.zeros(4)),
        lambda: sum_parts(x, out=torch.zeros(5)),
        lambda: rope_angles(torch.zeros(2, dtype=torch.int32), x[0].double()),
    ):
        with pytest.raises(ValueError):
            call()

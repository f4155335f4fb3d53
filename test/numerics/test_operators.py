"""Both implementations of the operators, against fp64, on the strides that layers give them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.linear import SMALL_ROWS
from sps_runtime.ops.operators import Operators
from sps_runtime.ops.weight import PlainWeight

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
"""Largest error of a result near one: a few roundings."""

SHAPES = list(product((0, 1, 5, SMALL_ROWS, SMALL_ROWS + 1, 70), (8, 24, 896)))


@pytest.fixture(params=["torch", "sps_kernel"])
def ops(request: pytest.FixtureRequest) -> Operators:
    if request.param == "sps_kernel":
        pytest.importorskip("sps_kernel")
    return choose_ops(request.param).operators


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Random tensors; the last dim is a slice of wider rows, as q, k, v and gate, up are."""
    generator = torch.Generator().manual_seed(5)

    def one(*shape: int, dtype: torch.dtype) -> Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator)
        return wide.to(dtype)[..., : shape[-1]]

    return one


def near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    bound = DTYPES[got.dtype] * (1 + expected.abs())
    assert ((got.double() - expected).abs() <= bound).all()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_linear(ops: Operators, draw: Callable, rows: int, dim: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, dim, dtype=dtype), draw(40, dim, dtype=dtype) / dim**0.5
    bias = torch.randn(40).to(dtype)
    product = x.double() @ weight.double().T
    near(ops.linear(x, PlainWeight(weight)), product)
    near(
        ops.linear(x, PlainWeight(weight).rows(8, 24), bias[8:24]),
        (product + bias.double())[:, 8:24],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_norms(ops: Operators, draw: Callable, rows: int, dim: int, dtype: torch.dtype) -> None:
    x, residual, heads = draw(rows, dim, dtype=dtype), *(
        draw(*shape, dtype=dtype) for shape in ((rows, dim), (rows, 3, dim))
    )  # fmt: skip
    weight = 1 + 0.2 * torch.randn(dim).to(dtype)
    near(ops.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5))
    near(ops.rms_norm(heads, weight, 1e-5), normed(heads, weight, 1e-5))
    total = (residual.double() + x.double()).to(dtype)
    expected = normed(total, weight, 1e-5)
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    near(residual, total.double())
    near(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_silu_mul(ops: Operators, draw: Callable, rows: int, dim: int, dtype: torch.dtype) -> None:
    gate, up = draw(rows, dim, dtype=dtype), draw(rows, dim, dtype=dtype)
    if rows:
        gate[0, :2] = torch.tensor([-300.0, 300.0]).to(dtype)
    expected = gate.double() * gate.double().sigmoid() * up.double()
    near(ops.silu_mul(gate, up), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(rows, dim) for rows, dim in SHAPES if dim < 100])
def test_rotation(ops: Operators, draw: Callable, rows: int, dim: int, dtype: torch.dtype) -> None:
    """q and k are slices of one tensor's heads."""
    qkv = draw(rows, 7, dim, dtype=dtype)
    positions, frequencies = torch.randint(0, 1000, (rows,)), torch.rand(dim // 2)
    angles = positions[:, None] * frequencies
    rotate = ops.rotation(positions, frequencies, 1.0, dtype)
    first, second = qkv.double().chunk(2, dim=-1)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    turned = torch.complex(first, second) * turn
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    value = qkv[:, 6:].clone()
    q, k = rotate(qkv[:, :4], qkv[:, 4:6])
    # A product is rounded before it meets the other, so what a pair holds bounds the error.
    held = (first.abs() + second.abs()).repeat(1, 1, 2)
    bound = DTYPES[dtype] * (1 + held)
    assert ((q.double() - expected[:, :4]).abs() <= bound[:, :4]).all()
    assert ((k.double() - expected[:, 4:6]).abs() <= bound[:, 4:6]).all()
    assert torch.equal(qkv[:, 6:], value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_write_kv(ops: Operators, draw: Callable, rows: int, dtype: torch.dtype) -> None:
    qkv = draw(rows, 7, 24, dtype=dtype)
    pools = torch.full((2, 5, 2, 16, 24), torch.nan).to(dtype)
    expected = pools.clone()
    places = torch.randperm(5 * 16, generator=torch.Generator().manual_seed(rows))[:rows]
    slots, offsets = places // 16, places % 16
    for row, (slot, offset) in enumerate(zip(slots.tolist(), offsets.tolist(), strict=True)):
        expected[0, slot, :, offset] = qkv[row, 3:5]
        expected[1, slot, :, offset] = qkv[row, 5:7]
    ops.write_kv(qkv[:, 3:5], qkv[:, 5:7], pools[0], pools[1], slots.int(), offsets.int())
    assert torch.equal(pools.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0))


def test_operators_may_be_asked_for() -> None:
    assert choose_ops("torch").name == "torch"
    assert choose_ops("auto").name in ("torch", "sps_kernel")

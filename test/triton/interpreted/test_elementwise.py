"""Norm, gate, rope and KV write against torch's operators, on the strides that layers give them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sps_runtime.ops import kv_rows
from sps_runtime.ops.operators import TORCH
from sps_runtime.ops.triton.operators import TritonOperators
from sps_runtime.ops.triton.rope import rope_kv_write, rope_table

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
FORMATS = pytest.mark.parametrize("kv_format", ["native", "fp8_e4m3", "int8"])
OPS = TritonOperators()
PAGE, SLOTS, KV_HEADS = 16, 6, 2


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random; the last dim is a slice of wider rows whose rest is NaN."""
    wide = torch.full((*shape[:-1], shape[-1] + 8), torch.nan, dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(shape).to(dtype)
    return wide[..., : shape[-1]]


def near(got: Tensor, want: Tensor, errors: float = 2e-6) -> None:
    """Within a few roundings of numbers of size one."""
    assert got.shape == want.shape and got.dtype == want.dtype
    bound = 0.02 if got.dtype == torch.bfloat16 else errors
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(0, 24), (1, 896), (5, 24), (70, 64)])
def test_norms(dtype: torch.dtype, rows: int, dim: int) -> None:
    x, heads, residual = (
        strided(*shape, dtype=dtype) for shape in ((rows, dim), (rows, 3, dim), (rows, dim))
    )
    weight = 1 + 0.2 * torch.randn(dim).to(dtype)
    near(OPS.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    near(OPS.rms_norm(heads, weight, 1e-5), TORCH.rms_norm(heads, weight, 1e-5))
    total = residual.clone()
    want = TORCH.add_rms_norm(x.clone(), total, weight, 1e-5)
    got = OPS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    near(got, want)


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(0, 24), (1, 24), (3, 2100)])
def test_silu_mul(dtype: torch.dtype, rows: int, dim: int) -> None:
    gate, up = strided(rows, dim, dtype=dtype), strided(rows, dim, dtype=dtype)
    if rows:
        gate[0, :3] = torch.tensor([-300.0, 300.0, 0.0]).to(dtype)
    near(OPS.silu_mul(gate, up), TORCH.silu_mul(gate.clone(), up))


@DTYPES
@pytest.mark.parametrize(("rows", "dim", "turned"), [(0, 24, 24), (1, 16, 16), (70, 24, 16)])
def test_rotation(dtype: torch.dtype, rows: int, dim: int, turned: int) -> None:
    """q and k are slices of one tensor; dims beyond the table's stay as they are."""
    qkv = strided(rows, 7, dim, dtype=dtype)
    positions, frequencies = torch.randint(0, 100_000, (rows,)), torch.rand(turned // 2)
    before = qkv.clone()
    want = TORCH.rotation(positions, frequencies, 1.25, dtype)(
        before[:, :4, :turned], before[:, 4:6, :turned]
    )
    q, k = OPS.rotation(positions, frequencies, 1.25, dtype)(qkv[:, :4], qkv[:, 4:6])
    near(q[..., :turned].contiguous(), want[0], 1e-5)
    near(k[..., :turned].contiguous(), want[1], 1e-5)
    assert torch.equal(qkv[..., turned:], before[..., turned:])
    assert torch.equal(qkv[:, 6:], before[:, 6:])


@DTYPES
@FORMATS
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_writes_are_the_references_bytes(rows: int, kv_format: str, dtype: torch.dtype) -> None:
    """With rope in the same pass, and without; slots below 0 are written nowhere."""
    dim = 24
    qkv = strided(rows, 8, dim, dtype=dtype)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    if rows:
        v[0], v[0, 0, 0] = 0.0, 1e5  # a row of zeros, one beyond fp8's range
    stored = kv_rows.storage_dtype(kv_format, dtype)
    row = dim + (kv_rows.SCALE_BYTES if kv_format == "int8" else 0)
    fresh = torch.randint(0, 255, (2, SLOTS, KV_HEADS, PAGE, row)).to(torch.uint8).to(stored)
    places = torch.randperm(SLOTS * PAGE)[:rows]
    slots, offsets = (places // PAGE).int(), (places % PAGE).int()
    nowhere = torch.arange(rows) % 5 == 3
    written, together, want = fresh.clone(), fresh.clone(), fresh.clone()
    masked = torch.where(nowhere, -1, slots)

    table = rope_table(torch.arange(rows), torch.rand(dim // 2), 1.0)
    rope_kv_write(q, k, v, table, *together, masked, offsets)
    OPS.write_kv(k, v, *written, masked, offsets)
    here = ~nowhere
    TORCH.write_kv(k[here], v[here], *want, slots[here], offsets[here])
    for got in (written, together):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_every_fp8_code_and_what_lies_between() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    between = (codes[:-1] + codes[1:]) / 2
    beyond = torch.tensor([449.0, 1e6, torch.inf, -torch.inf, torch.nan, 1e-9, -0.0])
    x = torch.cat((codes, between, between.nextafter(codes[1:]), beyond))
    x = torch.cat((x, x.new_zeros(-len(x) % 16))).view(-1, 1, 16)
    pools = torch.zeros(2, len(x), 1, 1, 16, dtype=torch.uint8)
    slots = torch.arange(len(x), dtype=torch.int32)
    OPS.write_kv(x, x, *pools, slots, torch.zeros_like(slots))
    want = kv_rows.encode(x, "fp8_e4m3")
    got, number = pools[0, :, 0], ~x.isnan()
    assert torch.equal(got[number], want[number])
    assert (got[~number] & 0x7F == 0x7F).all()

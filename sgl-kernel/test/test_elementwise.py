"""RMSNorm, rope with KV write and SiLU-mul against float64, per instruction set."""

from __future__ import annotations

import pytest
import torch

from sps_kernel import rms_norm, rope, rope_kv_write, silu_mul

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def near(got, want, slack=1.0):
    ulp = 2.0**-22 if got.dtype == torch.float32 else 2.0**-8
    assert not torch.isnan(got).any()
    assert torch.all((got.double() - want).abs() <= slack * ulp * want.abs() + 1e-30)


def norm_ref(x, weight, eps):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 896), (1, 8), (5, 77), (4, 3, 64), (0, 64), (2, 1)], ids=str)
def test_rms_norm(isa, dtype, weight_dtype, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype)
    out = torch.full(shape, NAN, dtype=dtype)
    assert rms_norm(x, weight, 1e-6, out=out) is out
    near(out, norm_ref(x, weight, 1e-6), 2)


@DTYPES
@pytest.mark.parametrize("dim", [64, 900])
def test_rms_norm_with_residual(isa, dtype, dim):
    x, residual, weight = (
        torch.randn(7, dim).to(dtype),
        torch.randn(7, dim).to(dtype),
        torch.rand(dim),
    )
    total = x + residual
    out = rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, total)
    near(out, norm_ref(total, weight, 1e-5), 2)


@DTYPES
def test_rms_norm_of_heads_in_place(isa, dtype):
    qkv = torch.randn(5, 6 * 64 + 3).to(dtype)
    before = qkv.clone()
    q = qkv[:, 3 : 3 + 4 * 64].unflatten(1, (4, 64))
    weight = torch.rand(64)
    want = norm_ref(q, weight, 1e-6)
    rms_norm(q, weight, 1e-6, out=q)
    near(q, want, 2)
    assert torch.equal(qkv[:, :3], before[:, :3]) and torch.equal(qkv[:, 259:], before[:, 259:])


@DTYPES
@pytest.mark.parametrize("shape", [(3, 4864), (1, 5), (0, 32), (9, 33)], ids=str)
def test_silu_mul(isa, dtype, shape):
    both = (torch.randn(shape[0], 2 * shape[1]) * 6).to(dtype)
    gate, up = both[:, : shape[1]], both[:, shape[1] :]
    out = torch.full(shape, NAN, dtype=dtype)
    silu_mul(gate, up, out=out)
    near(out, torch.nn.functional.silu(gate.double()) * up.double(), 16)  # e^-x rounds x


def test_silu_mul_extremes(isa):
    gate = torch.tensor([[-1e30, -1000.0, -90.0, -87.0, 0.0, 90.0, 1000.0, 1e30] * 4])
    out = silu_mul(gate, torch.ones_like(gate))
    want = torch.nn.functional.silu(gate.double())
    assert torch.all((out.double() - want).abs() <= 1e-30 + 1e-6 * want.abs() + (gate < -87) * 1e-6)
    near(out[gate > -87], want[gate > -87], 4)


def table(positions, rotary):
    angles = torch.arange(positions)[:, None] * 10.0 ** -torch.linspace(0, 3, rotary // 2)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def rope_ref(x, cos_sin):
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[:, None, :half].double(), cos_sin[:, None, half:].double()
    a, b, rest = x[..., :half].double(), x[..., half : 2 * half].double(), x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest.double()], -1)


def close(got, want, size):
    ulp = 2.0**-22 if got.dtype == torch.float32 else 2.0**-8
    assert torch.all((got.double() - want).abs() <= ulp * want.abs() + 2.0**-22 * size)


@DTYPES
@pytest.mark.parametrize(("d", "rotary"), [(64, 64), (80, 80), (128, 64), (40, 12), (256, 256)])
def test_rope(isa, dtype, d, rotary):
    qkv = torch.randn(9, 6, d).to(dtype)
    q, k = qkv[:, :4], qkv[:, 4:]
    positions = torch.randint(0, 50, (9,), dtype=torch.int32)
    cos_sin = table(50, rotary)
    want = rope_ref(qkv, cos_sin[positions])
    rope(q, k, positions, cos_sin)
    close(qkv, want, 4.0)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_rope_kv_write(isa, dtype, threads):
    tokens, hq, hkv, d, page, slots = 300, 4, 2, 32, 16, 40
    qkv = torch.randn(tokens, hq + 2 * hkv, d).to(dtype)
    q, k, v = qkv[:, :hq], qkv[:, hq : hq + hkv], qkv[:, hq + hkv :]
    v_before = v.clone()
    k_pool = torch.full((slots, hkv, page, d), NAN, dtype=dtype)
    v_pool = torch.full((slots, hkv, page, d), NAN, dtype=dtype)
    where = torch.randperm(slots * page)[:tokens]
    place, offset = (where // page).int(), (where % page).int()
    place[::7] = -1
    positions, cos_sin = torch.randint(0, 99, (tokens,), dtype=torch.int32), table(99, d)
    want = rope_ref(qkv, cos_sin[positions])
    rope_kv_write(q, k, v, positions, cos_sin, k_pool, v_pool, place, offset, threads=threads)
    close(qkv[:, : hq + hkv], want[:, : hq + hkv], 4.0)
    assert torch.equal(v, v_before)
    kept = place >= 0
    at = (place[kept].long(), slice(None), offset[kept].long())
    assert torch.equal(k_pool[at], k[kept]) and torch.equal(v_pool[at], v[kept])
    assert int((~torch.isnan(k_pool[..., 0])).sum()) == int(kept.sum()) * hkv
    assert int((~torch.isnan(v_pool[..., 0])).sum()) == int(kept.sum()) * hkv


def rope_args(**changes):
    args = {
        "q": torch.zeros(3, 4, 32),
        "k": torch.zeros(3, 2, 32),
        "v": torch.zeros(3, 2, 32),
        "positions": torch.zeros(3, dtype=torch.int32),
        "cos_sin": torch.zeros(5, 32),
        "k_pool": torch.zeros(4, 2, 16, 32),
        "v_pool": torch.zeros(4, 2, 16, 32),
        "slots": torch.zeros(3, dtype=torch.int32),
        "offsets": torch.arange(3, dtype=torch.int32),
    }
    return args | changes


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": ints(0, 5, 0)},
        {"positions": ints(0, -1, 0)},
        {"positions": ints(0, 0)},
        {"positions": torch.zeros(3, dtype=torch.int64)},
        {"slots": ints(0, 4, 0)},
        {"offsets": ints(0, 16, 1)},
        {"offsets": ints(0, -1, 1)},
        {"cos_sin": torch.zeros(5, 34)},
        {"cos_sin": torch.zeros(5, 31)},
        {"k": torch.zeros(2, 2, 32)},
        {"k": torch.zeros(3, 2, 32).bfloat16()},
        {"v": torch.zeros(3, 1, 32)},
        {"k_pool": torch.zeros(4, 1, 16, 32)},
        {"v_pool": torch.zeros(4, 2, 32, 32)},
        {"v_pool": torch.zeros(3, 2, 16, 32)},
    ],
    ids=range(15),
)
def test_bad_rope(changes):
    args = rope_args(**changes)
    rope_kv_write(**rope_args())
    with pytest.raises(ValueError):
        rope_kv_write(**args)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6),
        lambda: rms_norm(torch.zeros(8), torch.zeros(8), 1e-6),
        lambda: rms_norm(torch.zeros(2, 8), torch.zeros(8), float("nan")),
        lambda: rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, residual=torch.zeros(1, 8)),
        lambda: rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, out=torch.zeros(2, 8).bfloat16()),
        lambda: silu_mul(torch.zeros(2, 8), torch.zeros(2, 7)),
        lambda: silu_mul(torch.zeros(2, 8), torch.zeros(2, 8).bfloat16()),
        lambda: silu_mul(torch.zeros(8, 2).T, torch.zeros(8, 2).T),
    ],
    ids=range(8),
)
def test_bad_rows(call):
    with pytest.raises(ValueError):
        call()

"""Quantized weights: what packing rounds to, and products against float64, per instruction set."""

from __future__ import annotations

import pytest
import torch

from sps_kernel import (
    Program,
    current_isa,
    pack_weight,
    packed_linear,
    packed_nbytes,
    set_isa,
    unpack_weight,
)

NAN = float("nan")
KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
MANY_ROWS = 48
TWO_BYTE_ROWS = 4  # up to which int8 weights meet x in two bytes
# The 4-bit values, in units of a group's scale.
INT4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])


def packed(w, kind, group=64, threads=1):
    """`w` packed into memory of 0xff, so that scales left unwritten are NaN; aligned to nothing."""
    n, k = w.shape
    out = torch.full((packed_nbytes(n, k, kind, group) + 3,), 255, dtype=torch.uint8)[3:]
    pack_weight(w, kind, out, group, threads)
    return out


def unpacked(p, w, kind, group=64):
    return unpack_weight(p, *w.shape, kind, torch.float32, group)


def scales(p, n, k, kind, group):
    """Scales [N, groups] by the documented layout."""
    codes = group * {"int8": 16, "int4": 8}[kind]
    panels = p.clone().reshape((n + 15) // 16, -1)
    begins = [g // 2 * (64 + 2 * codes) + g % 2 * 32 for g in range((k + group - 1) // group)]
    parts = [panels[:, begin : begin + 32].contiguous() for begin in begins]
    by_group = [part.view(torch.bfloat16).reshape(-1)[:n].float() for part in parts]
    return torch.stack(by_group, 1)


def per_column(s, k, group):
    return s.repeat_interleave(group, 1)[:, :k]


def fixed_point_error(x, w, kind, group):
    """Bound on what taking a few rows of bfloat16 x in fixed point changes, [M, N]."""
    two_bytes = kind == "int8" and len(x) <= TWO_BYTE_ROWS
    digits = 127 * 256 if two_bytes else 127
    pad = (0, -x.shape[1] % group)
    x, w = (torch.nn.functional.pad(a.double(), pad).unflatten(1, (-1, group)) for a in (x, w))
    return x.abs().amax(2) @ w.abs().sum(2).T * (0.502 / digits)


def check(y, x, w, bias=None, more=0):
    want = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    ulp = 2.0**-24 if y.dtype == torch.float32 else 2.0**-8
    each = 2.0**-21 + 2.0**-24 * x.shape[1] ** 0.5
    assert not torch.isnan(y).any()
    assert torch.all((y.double() - want).abs() <= each * size + ulp * want.abs() + more + 1e-30)


def run(x, w, kind, bias=None, out=None, group=64, threads=1, rows=None, columns=None):
    n, k = w.shape
    p = packed(w, kind, group)
    r, c = rows or (0, n), columns or (0, k)
    if out is None:
        out = torch.full((x.shape[0], r[1] - r[0]), NAN, dtype=x.dtype)
    packed_linear(
        x, p, n, k, kind, bias, out=out, rows=rows, columns=columns, group=group, threads=threads
    )
    real = unpacked(p, w, kind, group)[r[0] : r[1], c[0] : c[1]]
    if x.dtype == torch.bfloat16 and x.shape[0] >= MANY_ROWS:
        real = real.bfloat16()  # where panels are widened once, scaled weights are rounded
    more = 0
    if x.dtype == torch.bfloat16 and x.shape[0] < MANY_ROWS and current_isa() == "avx512_bf16":
        more = fixed_point_error(x, real, kind, group)
    check(out, x, real, bias, more)
    return out


@KINDS
@DTYPES
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 8, 11, 16, 17, 48])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (3, 896), (67, 100), (40, 31), (18, 1), (35, 1501), (16, 0)]
)
def test_shapes(isa, kind, dtype, m, n, k):
    run(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), kind)


@KINDS
@DTYPES
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_groups_threads_and_many_panels(isa, kind, dtype, group):
    x, w = torch.randn(130, 1500).to(dtype), torch.randn(523, 1500).to(dtype)
    for m in (1, 7, 130):
        whole = run(x[:m], w, kind, group=group)
        assert torch.equal(run(x[:m], w, kind, group=group, threads=3), whole)


@KINDS
@DTYPES
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 6, 50])
def test_bias_and_output_dtypes(isa, kind, dtype, bias_dtype, m):
    x, w = torch.randn(m, 96).to(dtype), torch.randn(21, 96).to(dtype)
    bias = torch.randn(21).to(bias_dtype)
    for out_dtype in (torch.float32, torch.bfloat16):
        run(x, w, kind, bias, torch.full((m, 21), NAN, dtype=out_dtype))


@KINDS
@DTYPES
@pytest.mark.parametrize("m", [1, 4, 16, 50])
def test_slices(isa, kind, dtype, m):
    """Slices of rows and columns, strided and unaligned x and out: nothing else is touched."""
    w = torch.randn(83, 301).to(dtype)
    for rows in [(0, 83), (16, 64), (32, 83), (48, 48)]:
        for columns in [(0, 301), (64, 128), (192, 301), (64, 64)]:
            x = torch.full((m, 401), NAN, dtype=dtype)
            x = x[:, 7 : 7 + columns[1] - columns[0]].copy_(torch.randn(m, columns[1] - columns[0]))
            y = torch.full((m, 120), NAN, dtype=dtype)
            width = rows[1] - rows[0]
            run(x, w, kind, out=y[:, 5 : 5 + width], rows=rows, columns=columns)
            assert torch.isnan(y[:, :5]).all() and torch.isnan(y[:, 5 + width :]).all()


@KINDS
def test_all_instruction_sets_pack_alike(kind, isa):
    w = torch.randn(67, 331).bfloat16()
    here = packed(w, kind)
    set_isa("generic")
    there = packed(w, kind)
    if kind == "int8":
        assert torch.equal(here, there)
    # The search for a scale sums in another order: the winner may differ where two are equal.
    errors = [float((unpacked(p, w, kind) - w).square().sum()) for p in (here, there)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@DTYPES
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e30])
def test_int8_is_the_nearest_of_255_steps(isa, dtype, group, size):
    w = (torch.randn(50, 333).to(dtype).float() * size).to(dtype)
    p = packed(w, "int8", group)
    s = scales(p, 50, 333, "int8", group)
    step, real = per_column(s, 333, group), unpacked(p, w, "int8", group)
    assert torch.all((real - w.float()).abs() <= 0.5001 * step)
    # A scale is no larger than rounding it up to a bfloat16 makes it.
    padded = torch.nn.functional.pad(w.float().abs(), (0, -333 % group))
    most = padded.reshape(50, -1, group).amax(2)
    assert torch.all((s >= most / 127.01) & (s <= most / 127 * (1 + 2.0**-6)))


@DTYPES
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e15])
def test_int4_takes_the_nearest_value_and_a_good_scale(isa, dtype, group, size):
    w = (torch.randn(50, 333).to(dtype).float() * size).to(dtype)
    p = packed(w, "int4", group)
    s = per_column(scales(p, 50, 333, "int4", group), 333, group)
    off = (unpacked(p, w, "int4", group) - w.float()).abs()
    nearest = (s[..., None] * INT4 - w.float()[..., None]).abs().amin(-1)
    assert torch.all(off <= nearest * 1.0001 + 1e-4 * s.abs())
    # Against the scale that reaches the largest weight, unsearched.
    padded = torch.nn.functional.pad(w.float(), (0, -333 % group)).reshape(50, -1, group)
    plain = (padded.abs().amax(2) / 127)[..., None]
    values = (plain[..., None] * INT4 - padded[..., None]).abs().amin(-1)
    whole = values.flatten(1)[:, :333]
    assert off.square().sum().sqrt() < 0.96 * whole.square().sum().sqrt()


def test_errors_of_normal_weights():
    w = torch.randn(256, 1024)
    for kind, group, most in [
        ("int8", 64, 0.0062),
        ("int8", 32, 0.0056),
        ("int4", 64, 0.082),
        ("int4", 32, 0.0745),
    ]:
        off = unpacked(packed(w, kind, group), w, kind, group) - w
        assert off.norm() / w.norm() < most


@KINDS
def test_zero_tiny_and_not_finite_weights(isa, kind):
    w = torch.randn(20, 192)
    w[3] = 0
    w[4, :64] = 1e-40
    w[5, 70] = float("inf")
    w[6, 130] = NAN
    real = unpacked(packed(w, kind), w, kind)
    assert torch.all(real[3] == 0) and torch.all(real[4, :64] == 0)
    assert torch.isnan(real[5, 64:128]).all() and torch.isnan(real[6, 128:]).all()
    rest = torch.ones(20, 192, dtype=torch.bool)
    rest[5, 64:128] = rest[6, 128:] = False
    assert torch.isfinite(real[rest]).all()


@KINDS
def test_padding_of_the_last_panel_is_not_seen(isa, kind):
    """Rows beyond n and columns beyond k do not reach the output, whatever x holds."""
    x = torch.randn(2, 70)
    x[0, 69] = float("inf")
    y = torch.full((2, 5), NAN)
    w = torch.randn(5, 70)
    packed_linear(x, packed(w, kind), 5, 70, kind, out=y)
    assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1]).all()


@KINDS
@pytest.mark.parametrize("m", [1, 5, 60])
def test_x_that_is_huge_tiny_zero_or_not_finite(isa, kind, m):
    w = torch.randn(40, 200)
    x = torch.randn(m, 200).bfloat16()
    x[:, :64] *= 1e30
    run(x, w, kind)
    x[:, :64] = 0
    x[:, 64:128] *= 1e-25
    run(x, w, kind)
    x[-1, 70], x[0, 199] = float("inf"), NAN
    y = torch.zeros(m, 40)
    packed_linear(x, packed(w, kind), 40, 200, kind, out=y)
    assert not torch.isfinite(y[0]).any() and not torch.isfinite(y[-1]).any()
    assert torch.isfinite(y[1:-1]).all()


@KINDS
def test_sizes(kind):
    """Codes of whole blocks of 8 columns, a bfloat16 scale for each group, 64-byte panels."""
    for n, k, group in [(1, 1, 64), (16, 64, 64), (17, 100, 32), (896, 4864, 64), (0, 7, 64)]:
        codes = (k + 7) // 8 * 8 * (16 if kind == "int8" else 8)
        scales = ((k + group - 1) // group * 32 + 63) // 64 * 64
        assert packed_nbytes(n, k, kind, group) == (n + 15) // 16 * (codes + scales)


@KINDS
def test_threads_pack_alike(kind):
    w = torch.randn(131, 200)
    assert torch.equal(packed(w, kind, threads=2), packed(w, kind))


@pytest.mark.parametrize(
    "bad",
    [{"group": 48}, {"group": 512}, {"group": 0}, {"columns": (32, 128)}, {"columns": (0, 100)}],
    ids=str,
)
def test_bad_arguments(bad):
    p, x = packed(torch.zeros(16, 128), "int4"), torch.zeros(1, 128)
    if "columns" in bad:
        x = x[:, : bad["columns"][1] - bad["columns"][0]]
    out = torch.full((1, 16), NAN)
    with pytest.raises(ValueError):
        packed_linear(x, p, 16, 128, "int4", out=out, **bad)
    assert torch.isnan(out).all()


@KINDS
@pytest.mark.parametrize("m", [1, 60])
def test_recorded(kind, m):
    x, w = torch.randn(m, 70), torch.randn(50, 70)
    p, out, program = packed(w, kind), torch.full((m, 50), NAN), Program()
    with program.recording():
        packed_linear(x, p, 50, 70, kind, out=out)
    x.copy_(torch.randn(m, 70)), out.fill_(NAN)
    program.run()
    check(out, x, unpacked(p, w, kind))

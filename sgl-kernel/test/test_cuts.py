"""Weights cut along k, each slice packed by itself: the same bits, from other places in memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sps_kernel import Program, pack_weight, packed_linear, packed_nbytes, unpack_weight

NAN = float("nan")
KINDS = pytest.mark.parametrize("kind", ["bf16", "fp32", "int8", "int4"])
ROWS = (0, 1, 2, 4, 5, 8, 13, 16, 17, 48, 130)


def packed(w, kind, cuts):
    """`w` packed into memory of 0xff, so that bytes left unwritten are NaN; aligned to nothing."""
    out = torch.full((packed_nbytes(*w.shape, kind, cuts=cuts) + 3,), 255, dtype=torch.uint8)[3:]
    pack_weight(w, kind, out, threads=2, cuts=cuts)
    return out


def product(x, p, w, kind, cuts=(), threads=1, **slices):
    rows = slices.get("rows") or (0, w.shape[0])
    out = torch.full((len(x), rows[1] - rows[0]), NAN, dtype=x.dtype)
    packed_linear(x, p, *w.shape, kind, out=out, threads=threads, cuts=cuts, **slices)
    return out


@KINDS
@pytest.mark.parametrize("cuts", [(128,), (64, 192), (0, 64, 64, 320), (448, 896)], ids=str)
def test_cuts_change_no_bit(isa, kind, cuts):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    k = 1501
    w = torch.randn(67, k).to(dtype)
    whole, cut = packed(w, kind, ()), packed(w, kind, cuts)
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        wanted = product(x, whole, w, kind)
        assert torch.equal(product(x, cut, w, kind, cuts), wanted)
        assert torch.equal(product(x, cut, w, kind, cuts, threads=3), wanted)


@KINDS
@pytest.mark.parametrize("columns", [(0, 128), (128, 301), (64, 192), (192, 301), (128, 128)])
def test_columns_of_one_slice_and_of_several(isa, kind, columns):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    cuts, rows, w = (128, 256), (16, 48), torch.randn(67, 301).to(dtype)
    whole, cut = packed(w, kind, ()), packed(w, kind, cuts)
    for m in (1, 3, 9, 50):
        x = torch.randn(m, columns[1] - columns[0]).to(dtype)
        wanted = product(x, whole, w, kind, rows=rows, columns=columns)
        assert torch.equal(product(x, cut, w, kind, cuts, rows=rows, columns=columns), wanted)


@KINDS
def test_many_columns(isa, kind):
    """Slices of several blocks of cells, with rows of several blocks."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    w, cuts = torch.randn(75, 5000).to(dtype), (64, 2496)
    x = torch.randn(331, 5000).to(dtype)
    wanted = product(x, packed(w, kind, cuts), w, kind, cuts)
    exact = x.double() @ unpack_weight(packed(w, kind, cuts), 75, 5000, kind, cuts=cuts).double().T
    size = x.double().abs() @ w.double().abs().T
    rounding = 2.0**-9 if kind.startswith("int") else 1e-5  # of codes times scales
    assert torch.all((wanted.double() - exact).abs() <= 2.0**-8 * exact.abs() + rounding * size)


@KINDS
def test_each_slice_is_a_packed_weight(kind):
    """What the layout promises: slices one after another, each as if packed alone."""
    w = torch.randn(40, 300).bfloat16()
    bounds = (0, 64, 192, 300)
    parts = [packed(w[:, a:b], kind, ()) for a, b in pairwise(bounds)]
    cut = packed(w, kind, bounds[1:-1])
    assert torch.equal(torch.cat(parts), cut)
    real = unpack_weight(cut, 40, 300, kind, cuts=bounds[1:-1])
    assert torch.equal(real, unpack_weight(packed(w, kind, ()), 40, 300, kind))


@pytest.mark.parametrize("cuts", [(-64,), (64, 0), (320,), (63,)], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_cuts_that_cannot_be(kind, cuts):
    w = torch.zeros(16, 300)
    with pytest.raises(ValueError):
        packed_nbytes(16, 300, kind, cuts=cuts)
    with pytest.raises(ValueError):
        pack_weight(
            w, kind, torch.zeros(packed_nbytes(16, 300, kind), dtype=torch.uint8), cuts=cuts
        )


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_recorded(kind):
    cuts, w = (64,), torch.randn(50, 170).bfloat16()
    p, x = packed(w, kind, cuts), torch.randn(2, 170).bfloat16()
    out, program = torch.full((2, 50), NAN, dtype=torch.bfloat16), Program()
    with program.recording():
        packed_linear(x, p, 50, 170, kind, out=out, cuts=cuts)
    x.copy_(torch.randn(2, 170))
    out.fill_(NAN)
    program.run()
    assert torch.equal(out, product(x, p, w, kind, cuts))

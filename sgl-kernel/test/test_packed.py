"""Packed weights against float64, per instruction set; the checksum against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sps_kernel import (
    Program,
    crc32c,
    pack_weight,
    packed_linear,
    packed_nbytes,
    packed_rows,
    unpack_weight,
)
from sps_kernel._core import crc32c_generic

NAN = float("nan")
DTYPE_OF = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = pytest.mark.parametrize("kind", ["bf16", "fp32"])


def packed(w, kind, threads=1):
    """`w` packed into memory of 0xff, so that bytes left unwritten are NaN; aligned to nothing."""
    n, k = w.shape
    out = torch.full((packed_nbytes(n, k, kind) + 3,), 255, dtype=torch.uint8)[3:]
    pack_weight(w, kind, out, threads=threads)
    return out


def check(y, x, w, bias=None):
    want = x.double() @ w.double().T
    # Errors grow with the sums of absolute products, whatever they cancel to, and with their count.
    size = x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    ulp = 2.0**-24 if y.dtype == torch.float32 else 2.0**-8
    bound = (2.0**-21 + 2.0**-24 * x.shape[1] ** 0.5) * size + ulp * want.abs() + 1e-30
    assert not torch.isnan(y).any()
    assert torch.all((y.double() - want).abs() <= bound)


def run(x, w, kind, bias=None, out=None, **slices):
    n, k = w.shape
    rows, columns = slices.get("rows") or (0, n), slices.get("columns") or (0, k)
    if out is None:
        out = torch.full((x.shape[0], rows[1] - rows[0]), NAN, dtype=x.dtype)
    assert packed_linear(x, packed(w, kind), n, k, kind, bias, out=out, **slices) is out
    check(out, x, w[rows[0] : rows[1], columns[0] : columns[1]], bias)
    return out


@KINDS
@pytest.mark.parametrize("m", [0, 1, 2, 7, 8, 9, 15, 16, 17, 29, 100])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (3, 896), (67, 100), (64, 31), (18, 1), (35, 1501), (48, 2048)]
)
def test_shapes(isa, kind, m, n, k):
    dtype = DTYPE_OF[kind]
    run(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), kind)


@KINDS
def test_many_rows_and_columns(isa, kind):
    """More than one block of rows, of panels and of cells."""
    dtype = DTYPE_OF[kind]
    run(torch.randn(331, 2601).to(dtype), torch.randn(1100, 2601).to(dtype), kind)


@KINDS
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 6, 40])
def test_bias_and_float32_output(isa, kind, bias_dtype, m):
    dtype = DTYPE_OF[kind]
    x, w = torch.randn(m, 96).to(dtype), torch.randn(21, 96).to(dtype)
    bias = torch.randn(21).to(bias_dtype)
    for out_dtype in (torch.float32, torch.bfloat16):
        run(x, w, kind, bias, torch.full((m, 21), NAN, dtype=out_dtype))


@KINDS
@pytest.mark.parametrize("m", [1, 4, 16, 50])
def test_slices(isa, kind, m):
    """Slices of rows and columns, strided and unaligned x and out: nothing else is touched."""
    dtype = DTYPE_OF[kind]
    w = torch.randn(83, 301).to(dtype)
    for rows in [(0, 83), (16, 64), (32, 83), (48, 48)]:
        for columns in [(0, 301), (64, 128), (130, 301), (8, 8)]:
            x = torch.randn(m, 401).to(dtype)[:, 7 : 7 + columns[1] - columns[0]]
            y = torch.full((m, 120), NAN, dtype=dtype)
            width = rows[1] - rows[0]
            run(x, w, kind, out=y[:, 5 : 5 + width], rows=rows, columns=columns)
            assert torch.isnan(y[:, :5]).all() and torch.isnan(y[:, 5 + width :]).all()


@KINDS
def test_nothing_beyond_x_is_read_into_the_result(isa, kind):
    """What lies past a row's end (an odd k's other half) is NaN; the result is not."""
    dtype = DTYPE_OF[kind]
    for m in (1, 5, 33):
        whole = torch.full((m, 80), NAN, dtype=dtype)
        whole[:, :33] = torch.randn(m, 33).to(dtype)
        run(whole[:, :33], torch.randn(20, 33).to(dtype), kind)


@KINDS
def test_a_row_does_not_depend_on_others_nor_on_threads_nor_on_slices(isa, kind):
    dtype = DTYPE_OF[kind]
    x, w = torch.randn(90, 1500).to(dtype), torch.randn(203, 1500).to(dtype)
    whole = run(x, w, kind)
    for m in (1, 2, 8, 13, 16, 17, 64):
        assert torch.equal(run(x[:m], w, kind), whole[:m])
    p = packed(w, kind)
    for threads in (2, 3):
        out = torch.full_like(whole, NAN)
        packed_linear(x, p, 203, 1500, kind, out=out, threads=threads)
        assert torch.equal(out, whole)
    assert torch.equal(run(x, w, kind, rows=(32, 80)), whole[:, 32:80])


@KINDS
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 2), (35, 97), (64, 300), (0, 5), (5, 0)])
def test_unpack_gives_the_weight_back(kind, n, k):
    whole = torch.randn(n, k + 9)
    for dtype in (torch.float32, torch.bfloat16):
        w = whole.to(dtype)[:, 3 : 3 + k]
        p = packed(w, kind)
        stored = w.to(DTYPE_OF[kind])
        for out in (torch.float32, torch.bfloat16):
            assert torch.equal(unpack_weight(p, n, k, kind, out), stored.to(out))
        assert torch.equal(packed(w, kind, threads=2), p)
    assert p.numel() == packed_nbytes(n, k, kind)


def test_layout_is_as_documented():
    w = torch.arange(17 * 3, dtype=torch.float32).reshape(17, 3)
    padded = torch.zeros(32, 4)
    padded[:17, :3] = w
    want = padded.bfloat16().reshape(2, 16, 2, 2).permute(0, 2, 1, 3).contiguous()
    assert torch.equal(packed(w, "bf16"), want.view(torch.uint8).flatten())
    want = padded[:, :3].reshape(2, 16, 3).permute(0, 2, 1).contiguous()
    assert torch.equal(packed(w, "fp32"), want.view(torch.uint8).flatten())


def test_numpy():
    x, w = np.random.rand(3, 40).astype(np.float32), np.random.rand(9, 40).astype(np.float32)
    p = np.empty(packed_nbytes(9, 40, "fp32"), np.uint8)
    pack_weight(w, "fp32", p)
    out = np.empty((3, 9), np.float32)
    np.testing.assert_allclose(packed_linear(x, p, 9, 40, "fp32", out=out), x @ w.T, rtol=1e-5)
    np.testing.assert_array_equal(unpack_weight(p, 9, 40, "fp32"), w)


DT = torch.bfloat16
GOOD = {"m": 2, "width": 8, "n": 20, "k": 8, "kind": "bf16", "dtype": DT, "outputs": 20}


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "int3"},
        {"width": 9},
        {"outputs": 19},
        {"k": 10},
        {"n": 33},
        {"dtype": torch.float32},
        {"rows": (8, 20), "outputs": 12},
        {"rows": (0, 15), "outputs": 15},
        {"rows": (0, 32), "outputs": 32},
        {"rows": (16, 0), "outputs": 0},
        {"columns": (1, 8), "width": 7},
        {"columns": (0, 3), "width": 3},
        {"columns": (0, 10), "width": 10},
        {"columns": (-2, 8), "width": 10},
        {"bias": torch.zeros(19)},
        {"threads": 0},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    a = {**GOOD, **bad}
    p = packed(torch.zeros(20, 8), "bf16")
    x, out = torch.zeros(a["m"], a["width"]).to(a["dtype"]), torch.full((a["m"], a["outputs"]), NAN)
    rest = {key: a[key] for key in ("rows", "columns", "threads") if key in a}
    with pytest.raises(ValueError):
        packed_linear(x, p, a["n"], a["k"], a["kind"], a.get("bias"), out=out, **rest)
    assert torch.isnan(out).all()


def crc32c_by_bits(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    data = torch.randint(0, 256, (40_000,), dtype=torch.uint8)
    for begin, size in [(0, 0), (1, 1), (3, 17), (5, 3 * 4096), (7, 30_000)]:
        part = data[begin : begin + size]
        want = crc32c_by_bits(bytes(part.tolist()))
        assert crc32c(part) == crc32c_generic(part) == want


def test_crc32c_on_threads():
    data = torch.randint(0, 256, ((9 << 20) + 5,), dtype=torch.uint8)
    assert crc32c(data, threads=2) == crc32c(data) == crc32c_generic(data)


@KINDS
def test_recorded(kind):
    dtype = DTYPE_OF[kind]
    x, w, bias = torch.randn(3, 70).to(dtype), torch.randn(50, 70).to(dtype), torch.randn(50)
    p, out, program = packed(w, kind), torch.full((3, 50), NAN, dtype=dtype), Program()
    with program.recording():
        packed_linear(x, p, 50, 70, kind, bias, out=out)
    x.copy_(torch.randn(3, 70)), out.fill_(NAN)
    program.run()
    check(out, x, w, bias)


@KINDS
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (35, 7), (67, 100), (48, 897)])
def test_rows_are_the_weights(kind, ids, n, k):
    w = torch.randn(n, k).to(DTYPE_OF[kind])
    w[n // 2] = torch.nan
    index = torch.randint(n, (40,), dtype=ids)
    index[:2] = torch.tensor([0, n - 1])
    wide = torch.full((40, k + 3), 7, dtype=w.dtype)
    program = Program()
    with program.recording():
        out = packed_rows(index, packed(w, kind), n, k, kind, out=wide[:, :k])
    for _ in range(2):
        bits = torch.int16 if kind == "bf16" else torch.int32
        assert torch.equal(out.contiguous().view(bits), w[index.long()].view(bits))
        assert (wide[:, k:] == 7).all()
        index.copy_(torch.randint(n, (40,)))
        program.run()
    for wrong in (-1, n):
        index[3] = wrong
        with pytest.raises(ValueError, match="ids\\[3\\]"):
            program.run()


def test_rows_of_codes_or_into_another_dtype_are_refused():
    w, ids = torch.randn(16, 64), torch.zeros(2, dtype=torch.int64)
    codes = torch.zeros(packed_nbytes(16, 64, "int8"), dtype=torch.uint8)
    for arguments in (
        (ids, codes, 16, 64, "int8", torch.zeros(2, 64)),
        (ids, packed(w, "fp32"), 16, 64, "fp32", torch.zeros(2, 64, dtype=torch.bfloat16)),
        (ids, packed(w, "fp32"), 16, 64, "fp32", torch.zeros(2, 63)),
        (ids, packed(w, "fp32"), 32, 64, "fp32", torch.zeros(2, 64)),
        (ids.float(), packed(w, "fp32"), 16, 64, "fp32", torch.zeros(2, 64)),
    ):
        *rest, out = arguments
        with pytest.raises(ValueError):
            packed_rows(*rest, out=out)

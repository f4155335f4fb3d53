"""small_gemm against float64, per instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sps_kernel import gemv, small_gemm

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def check(y, x, w, bias=None):
    want = x.double() @ w.double().T
    # Errors grow with the sums of absolute products, whatever they cancel to.
    size = x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    ulp = 2.0**-24 if y.dtype == torch.float32 else 2.0**-8
    bound = 2.0**-20 * size + ulp * want.abs() + 1e-30
    assert not torch.isnan(y).any()
    assert torch.all((y.double() - want).abs() <= bound)


@DTYPES
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (3, 896), (67, 100), (64, 31), (18, 1), (35, 2500)])
def test_shapes(isa, dtype, m, n, k):
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.full((m, n), NAN, dtype=dtype)
    assert small_gemm(x, w, out=out) is out
    check(out, x, w)


@DTYPES
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 6])
def test_bias_and_float32_output(isa, dtype, bias_dtype, m):
    x, w = torch.randn(m, 96).to(dtype), torch.randn(21, 96).to(dtype)
    bias = torch.randn(21).to(bias_dtype)
    check(small_gemm(x, w, bias), x, w, bias)
    check(small_gemm(x, w, bias, out=torch.full((m, 21), NAN)), x, w, bias)


@DTYPES
@pytest.mark.parametrize("m", [1, 4, 9])
def test_slices(isa, dtype, m):
    """Slices of rows and columns, odd offsets, strided outputs: no copies, nothing else touched."""
    whole_x, whole_w = torch.randn(m, 301).to(dtype), torch.randn(50, 301).to(dtype)
    x, w = whole_x[:, 7:208], whole_w[11:44, 99:300]
    whole_y = torch.full((m, 60), NAN, dtype=dtype)
    small_gemm(x, w, out=whole_y[:, 5:38])
    check(whole_y[:, 5:38], x, w)
    assert torch.isnan(whole_y[:, :5]).all() and torch.isnan(whole_y[:, 38:]).all()


@DTYPES
def test_tensor_parallel_slices_add_up(dtype):
    x, w = torch.randn(2, 256).to(dtype), torch.randn(32, 256).to(dtype)
    parts = [
        small_gemm(x[:, i : i + 64], w[:, i : i + 64], out=torch.empty(2, 32))
        for i in range(0, 256, 64)
    ]
    check(sum(parts), x, w)


@DTYPES
def test_threads_change_nothing(dtype):
    x, w = torch.randn(3, 320).to(dtype), torch.randn(203, 320).to(dtype)
    assert torch.equal(small_gemm(x, w, threads=3), small_gemm(x, w))


@DTYPES
def test_empty(isa, dtype):
    x, w = torch.zeros(2, 0).to(dtype), torch.zeros(3, 0).to(dtype)
    assert torch.equal(small_gemm(x, w), torch.zeros(2, 3, dtype=dtype))
    assert small_gemm(torch.zeros(2, 8), torch.zeros(0, 8)).shape == (2, 0)


def test_gemv_and_numpy():
    x, w = np.random.rand(40).astype(np.float32), np.random.rand(9, 40).astype(np.float32)
    np.testing.assert_allclose(gemv(x, w), w @ x, rtol=1e-5)
    xt, wt = torch.randn(64).bfloat16(), torch.randn(5, 64).bfloat16()
    check(gemv(xt, wt)[None], xt[None], wt)


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(2, 8), torch.zeros(3, 9)),
        (torch.zeros(2, 8), torch.zeros(3, 8).bfloat16()),
        (torch.zeros(2, 8).double(), torch.zeros(3, 8).double()),
        (torch.zeros(2, 8), torch.zeros(8, 3).T),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(4)),
        (torch.zeros(1, 2, 8), torch.zeros(3, 8)),
    ],
    ids=range(6),
)
def test_bad_arguments(args):
    with pytest.raises(ValueError):
        small_gemm(*args)
    with pytest.raises(ValueError):
        small_gemm(torch.zeros(2, 8), torch.zeros(3, 8), out=torch.zeros(2, 4))

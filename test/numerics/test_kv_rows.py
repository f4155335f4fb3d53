"""Quantised KV: what is written, what is read, and attention over it, in torch and in kernels."""

from __future__ import annotations

import pytest
import torch

from sps_runtime.attention.backend import AttentionBackend, PagePool, QueryRun
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops import kv_rows, reference
from sps_runtime.ops.dispatch import choose_ops

FORMATS = pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3"])
BACKENDS = pytest.mark.parametrize("name", ["torch", "sps_kernel"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def backend_of(name: str) -> AttentionBackend:
    if name == "torch":
        return TorchBackend()
    return KernelBackend(pytest.importorskip("sps_kernel"))


@FORMATS
@DTYPES
def test_rows_lose_no_more_than_half_a_step(kv_format: str, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 3, 40) * torch.logspace(-3, 2, 50)[:, None, None]).to(dtype)
    rows = kv_rows.encode(x, kv_format)
    assert kv_rows.row_format(rows, 40) == kv_format
    read = kv_rows.decode(rows, kv_format, torch.float32)
    if kv_format == "int8":
        bound = x.float().abs().amax(-1, keepdim=True) / 127 * 0.5001
    else:
        bound = torch.maximum(x.float().abs() / 16, torch.tensor(2.0**-10))
    assert ((read - x.float()).abs() <= bound).all()


@FORMATS
@DTYPES
def test_kernels_write_the_bytes_of_the_reference(kv_format: str, dtype: torch.dtype) -> None:
    pytest.importorskip("sps_kernel")
    qkv = torch.randn(70, 6, 32, generator=torch.Generator().manual_seed(1)).mul(300).to(dtype)
    shape = (5, 2, 16, 36 if kv_format == "int8" else 32)
    where = torch.randperm(80, generator=torch.Generator().manual_seed(2))[:70].int()
    written = []
    for name in ("torch", "sps_kernel"):
        pools = torch.full((2, *shape), 7, dtype=torch.uint8)
        ops = choose_ops(name).operators
        ops.write_kv(qkv[:, 2:4], qkv[:, 4:], pools[0], pools[1], where // 16, where % 16)
        written.append(pools)
    assert torch.equal(*written)


@BACKENDS
@FORMATS
@DTYPES
@pytest.mark.parametrize(("count", "start", "window"), [(1, 90, None), (40, 70, None), (9, 50, 20)])
def test_attention(
    name: str, kv_format: str, dtype: torch.dtype, count: int, start: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(count)
    page, dim, kv_heads, length = 16, 24, 2, start + count
    total = -(-length // page)
    k, v = (
        kv_rows.encode(
            torch.randn(9, kv_heads, page, dim, generator=generator).to(dtype), kv_format
        )
        for _ in range(2)
    )
    ids = torch.randperm(9, generator=generator)[:total].int()
    for side in (k, v):  # behind the last token: rows that decode to NaN
        side[ids[-1], :, length - (total - 1) * page :] = 0xFF
    q = torch.randn(count, 6, dim, generator=generator).to(dtype)
    starts = torch.arange(total, dtype=torch.int32) * page
    run = QueryRun(0, count, start, ids, starts, length)
    got = backend_of(name).partial(q, [run], PagePool([k], [v], 9), scale=0.2, window=window)
    read = [
        reference.gather_pages([kv_rows.decode(side, kv_format, dtype)], 9, ids, length).double()
        for side in (k, v)
    ]
    o, lse = reference.attention(
        q.double(), *read, torch.arange(start, length), torch.arange(length), scale=0.2,
        window=window,
    )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.o.double(), o, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse.double(), rtol=0, atol=tolerance)


def test_what_holds_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no heads"):
        kv_rows.row_format(torch.zeros(1, 1, 16, 24), 20)
    with pytest.raises(ValueError, match="hold no heads"):
        kv_rows.row_format(torch.zeros(1, 1, 16, 24, dtype=torch.uint8), 16)

"""Quantised keys and values: written, read and refused as said."""

from __future__ import annotations

import pytest
import torch

import kv_rows
from attention_case import DTYPES, Case
from sps_kernel import KVPools, paged_attention, rope_kv_write

FORMATS = pytest.mark.parametrize("kv_format", kv_rows.FORMATS)


@DTYPES
@FORMATS
@pytest.mark.parametrize("d", [8, 24, 40, 64, 80, 128, 256])
def test_head_dims(isa, dtype, kv_format, d):
    Case(dtype, d, lengths=((37, 50), (1, 90), (3, 0)), kv_format=kv_format).check()


@DTYPES
@FORMATS
@pytest.mark.parametrize("page", [16, 64])
def test_pages_windows_and_groups(isa, dtype, kv_format, page):
    lengths = ((70, 133), (1, 300), (9, 0))
    case = Case(dtype, 64, page=page, lengths=lengths, pools=2, group=7, kv_format=kv_format)
    case.check()
    case.check(window=40)
    case.check(causal=False)


@DTYPES
@FORMATS
def test_many_rows_and_chunks(isa, dtype, kv_format):
    lengths = ((400, 600),)
    Case(dtype, 128, kv_heads=1, group=3, page=64, lengths=lengths, kv_format=kv_format).check()


@DTYPES
@FORMATS
def test_lists_per_head_unaligned(isa, dtype, kv_format):
    lengths = ((40, 70), (1, 64))
    Case(dtype, 64, kv_heads=3, lengths=lengths, per_head=True, unaligned=True,
         kv_format=kv_format).check()  # fmt: skip


@DTYPES
@FORMATS
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(dtype, kv_format, threads):
    lengths = ((1, 6000), (100, 100))
    Case(dtype, 64, page=64, pools=2, lengths=lengths, kv_format=kv_format).check(threads=threads)


def every_size(dtype):
    """Rows [tokens, 2, 32] of all sizes: zeros, almost nothing, halfway cases, beyond fp8."""
    x = torch.randn(64, 2, 32) * torch.logspace(-12, 6, 64)[:, None, None]
    x[0] = 0
    x[1] = 1e-35
    x[2, 0] = torch.arange(32) * 2.0**-10  # fp8's subnormals, and halfway between them
    x[2, 1] = torch.arange(32) - 0.5
    x[3, 0] = 448 + torch.arange(32)
    x[3, 1] = -1e30
    return x.to(dtype)


@DTYPES
@FORMATS
def test_written_rows(isa, dtype, kv_format):
    """Bytes as torch writes them; what is not written stays as it was."""
    k, v = every_size(dtype), every_size(dtype).flip(0)
    tokens, heads, d = k.shape
    row = kv_rows.width(d, kv_format)
    k_pool, v_pool = (torch.full((6, heads, 16, row), 7, dtype=torch.uint8) for _ in range(2))
    where = torch.randperm(6 * 16)[:tokens]
    slots, offsets = (where // 16).int(), (where % 16).int()
    slots[::9] = -1
    none = torch.zeros(tokens, dtype=torch.int32)
    rope_kv_write(k[:, :0], k, v, none, torch.zeros(1, 0), k_pool, v_pool, slots, offsets,
                  kv_format=kv_format)  # fmt: skip
    kept = slots >= 0
    at = (slots[kept].long(), slice(None), offsets[kept].long())
    for pool, x in ((k_pool, k), (v_pool, v)):
        assert torch.equal(pool[at], kv_rows.encode(x[kept], kv_format))
        pool[at] = 7
        assert torch.all(pool == 7)


@FORMATS
def test_not_finite_stays_so(isa, kv_format):
    k = torch.ones(2, 1, 16)
    k[0, 0, 3] = torch.nan
    row = kv_rows.width(16, kv_format)
    pools = [torch.zeros(1, 1, 16, row, dtype=torch.uint8) for _ in range(2)]
    at = torch.arange(2, dtype=torch.int32)
    rope_kv_write(k[:, :0], k, k, at * 0, torch.zeros(1, 0), *pools, at * 0, at,
                  kv_format=kv_format)  # fmt: skip
    read = kv_rows.decode(pools[0], kv_format, torch.float32)[0, 0, :2]
    assert torch.isnan(read[0]).any() and torch.all(read[1] == 1)


def test_bad_formats():
    rows = torch.zeros(2, 1, 16, 36, dtype=torch.uint8)
    kv = KVPools([rows], [rows], "int8")
    assert (kv.head_dim, kv.format, kv.dtype) == (32, "int8", "uint8")
    with pytest.raises(ValueError, match="format"):
        KVPools([rows], [rows], "int4")
    with pytest.raises(ValueError, match="uint8"):
        KVPools([rows.float()], [rows.float()], "int8")
    with pytest.raises(ValueError, match="multiple of 8"):
        KVPools([rows], [rows], "fp8_e4m3")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        KVPools([rows[..., :32]], [rows[..., :32]])
    items = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1]], dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="head dim"):
        paged_attention(torch.zeros(1, 1, 36), kv, items, one, one)
    x = torch.zeros(1, 1, 32)
    with pytest.raises(ValueError):
        rope_kv_write(x, x, x, one, torch.zeros(1, 0), rows, rows, one, one, kv_format="fp8_e4m3")

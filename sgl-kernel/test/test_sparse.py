"""Summaries and shares against float64, per instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sps_kernel
from sparse_case import NAN, Sequences, decode
from sps_kernel import page_shares, summarise_pages, summary_nbytes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
# Of rows times steps to bytes: error of log shares over the length of a (scaled) query.
ROUNDING = 0.02


@DTYPES
@pytest.mark.parametrize("d, page", [(16, 16), (32, 48), (64, 64), (80, 16), (128, 128), (256, 32)])
def test_summaries(isa, dtype, d, page):
    k = torch.randn(5, 3, page, d).to(dtype)
    v = (torch.randn(5, 3, page, d) + 1).to(dtype)
    k[1, 2, :, 3] = 0.5  # a channel that does not vary
    out = torch.full((5, 3, summary_nbytes(page, d, k.element_size())), 77, dtype=torch.uint8)
    slots = torch.tensor([4, 1], dtype=torch.int32)
    summarise_pages(k, v, slots, out)
    assert torch.all(out[[0, 2, 3]] == 77)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for slot in slots.tolist():
        for head in range(3):
            made = decode(out[slot, head], page, d, dtype)
            keys = k[slot, head].double()
            low, high = keys.amin(0), keys.amax(0)
            assert torch.equal(made["low"], low)
            assert torch.allclose(made["step"], (high - low) / 3, rtol=rounding, atol=1e-8)
            assert torch.allclose(made["mean_k"], keys.mean(0), rtol=rounding, atol=2e-6)
            mean_v = v[slot, head].double().mean(0)
            assert torch.allclose(made["mean_v"], mean_v, rtol=rounding, atol=2e-6)
            assert torch.all((made["keys"] - keys).abs() <= made["step"] * (0.5 + 3 * rounding))
            assert torch.all(made["codes"].amin(0) == 0)


def test_summaries_of_views_and_threads():
    """A pool whose heads and tokens are strided; one thread and two say the same."""
    k = torch.randn(4, 32, 2, 64).bfloat16().transpose(1, 2)
    v = torch.randn(4, 32, 2, 64).bfloat16().transpose(1, 2)
    shape = (4, 2, summary_nbytes(32, 64, 2))
    out = [torch.zeros(shape, dtype=torch.uint8) for _ in range(3)]
    slots = torch.arange(4, dtype=torch.int32)
    summarise_pages(k, v, slots, out[0])
    summarise_pages(k, v, slots, out[1], threads=2)
    summarise_pages(k.contiguous(), v.contiguous(), slots, out[2])
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def check_shares(case, rows, scale):
    """Errors of log shares stay within what rounding rows to bytes explains."""
    spread = float(case.q.double().pow(2).sum(-1).sqrt().max()) * scale
    errors = [torch.zeros(1)]
    for block, share in zip(case.blocks, case.shares(rows, scale), strict=True):
        want = case.truth(block, rows, scale)
        assert torch.isfinite(share).all()
        errors.append((share / want).log()[want > 1e-6])
    errors = torch.cat(errors)
    assert float(errors.square().mean().sqrt()) <= ROUNDING * spread
    assert float(errors.abs().max()) <= 6 * ROUNDING * spread


@DTYPES
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("d, page, block", [(32, 16, 64), (64, 64, 64), (128, 32, 32)])
def test_shares(isa, dtype, group, d, page, block):
    """Two sequences, one that begins in the middle, with short last blocks."""
    lengths = ((block * 5 + 23, block * 5 + 23), (block * 11 + 1, block * 3 + 1))
    case = Sequences(
        dtype, d, lengths=lengths, page=page, block=block, group=group, kv_heads=1 + (group < 3)
    )
    check_shares(case, 16, d**-0.5)


@pytest.mark.parametrize("rows", [0, 1, 4, 9, 16, 32, 100])
@pytest.mark.parametrize("page", [16, 64])
def test_rows(isa, rows, page):
    case = Sequences(
        torch.bfloat16, 64, lengths=((1088 + 40, 104),), page=page, block=64, superblock=64, group=3
    )
    check_shares(case, rows, 0.125)


def test_rows_of_each_block(isa):
    """Blocks of a call may be scored by different numbers of rows."""
    case = Sequences(
        torch.bfloat16, 64, lengths=((704 + 40, 232),), block=32, superblock=128, group=3
    )
    rows = np.array([6, 6, 32, 0, 1, 17, 6, 6])
    for i, (share, want) in enumerate(zip(case.shares(rows, 0.1), rows, strict=True)):
        alone = case.shares(int(want), 0.1)[i]
        assert torch.equal(share, alone)
        truth = case.truth(case.blocks[i], int(want), 0.1)
        torch.testing.assert_close(share.double(), truth, rtol=0.3, atol=1e-4)
    with pytest.raises(ValueError):
        case.shares(np.array([6, -1, 6, 6, 6, 6, 6, 6]), 0.1)


@DTYPES
def test_unaligned(isa, dtype):
    case = Sequences(dtype, 40, lengths=((400, 144),), page=16, superblock=64, offset=1)
    check_shares(case, 16, 0.2)


@pytest.mark.parametrize("d", [16, 24, 72, 256, 512])
def test_head_dims(isa, d):
    case = Sequences(torch.bfloat16, d, lengths=((200, 72),), superblock=64)
    check_shares(case, 5, d**-0.5)


def test_shares_do_not_depend_on_the_call(isa):
    """Nor on the number of threads: bit by bit."""
    case = Sequences(torch.bfloat16, 64, lengths=((1024 + 340, 340),), page=32, superblock=256)
    whole = case.shares(16, 0.125)
    for threads in (2, 3):
        again = case.shares(16, 0.125, threads)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    blocks = case.blocks
    for i in range(len(blocks)):
        case.blocks = blocks[i : i + 1]
        assert torch.equal(case.shares(16, 0.125)[0], whole[i])


@DTYPES
@pytest.mark.parametrize("size", [0.05, 1.0, 4.0], ids=["near", "far", "overflow"])
def test_what_bytes_hold_is_exact(isa, dtype, size):
    """Keys of four even values and rows of one size are not rounded: only exponentials differ. A
    page may have more mass, relative to a row's own block, than a float holds."""
    case = Sequences(dtype, 64, lengths=((1000, 232), (64, 64)), superblock=64, group=3)
    for pool in case.k:
        codes = torch.randint(0, 4, pool.shape)
        codes[:, :, 0], codes[:, :, 1] = 0, 3
        pool.copy_(torch.where(pool.isnan(), pool, codes.to(dtype)))
    case.q.copy_(torch.where(torch.rand(case.q.shape) < 0.5, -size, size))
    case.summarise()
    bound = 1.5e-2 if isa == "avx512_bf16" else 1e-4 * max(size, 1)
    for block, share in zip(case.blocks, case.shares(16, 1.0), strict=True):
        want = case.truth(block, 16, 1.0)
        torch.testing.assert_close(share.double(), want, rtol=bound, atol=1e-30)


def test_isas_agree():
    """Integers are the same everywhere; exponentials nearly."""
    case = Sequences(torch.float32, 64, lengths=((900, 260),), page=16, superblock=128, group=5)
    best, found = sps_kernel.current_isa(), []
    for name in sps_kernel.available_isas():
        sps_kernel.set_isa(name)
        found.append(torch.cat([s.flatten() for s in case.shares(16, 0.125)]))
    sps_kernel.set_isa(best)
    for share in found[1:]:
        torch.testing.assert_close(share, found[0], rtol=1.5e-2, atol=1e-30)


def test_bad_arguments():
    case = Sequences(torch.float32, 32, lengths=((160, 64),), superblock=32)

    def call(**changes):
        named = {
            "q": case.q,
            "blocks": case.blocks,
            "page_ids": case.page_ids,
            "summaries": case.summaries,
            "k_pools": case.k,
            "slots": case.slots,
            "rows": 4,
            "block": 16,
            "scale": 1.0,
        } | changes
        page_shares(**named)

    call()
    late = case.blocks.clone()
    late[0, 2] += 1
    outside = case.page_ids.clone()
    outside[0] = 2 * case.slots
    for bad in (
        {"q": case.q.bfloat16()},
        {"q": case.q[:, :3]},
        {"q": case.q[:10]},
        {"blocks": late},
        {"page_ids": outside},
        {"page_ids": case.page_ids[:5]},
        {"rows": -1},
        {"scale": NAN},
        {"slots": 1},
        {"k_pools": [k[:0] for k in case.k]},
        {"summaries": [s[:, :, :-1] for s in case.summaries]},
        {"summaries": case.summaries[:1]},
    ):
        with pytest.raises((ValueError, StopIteration)):
            call(**bad)
    with pytest.raises(ValueError):
        summary_nbytes(24, 64, 2)
    with pytest.raises(ValueError):
        summarise_pages(
            case.k[0], case.v[0], torch.tensor([999], dtype=torch.int32), case.summaries[0]
        )

"""Merge of states against float64, per instruction set."""

from __future__ import annotations

import pytest
import torch

from reference import merge_ref
from sps_kernel import merge_n_states, merge_states

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def states(n, tokens, heads, d, dtype):
    """Random states; a third of them empty, with NaN for an output."""
    os = [torch.randn(tokens, heads, d).to(dtype) for _ in range(n)]
    lses = [torch.randn(tokens, heads) * 8 for _ in range(n)]
    for o, lse in zip(os, lses, strict=True):
        empty = torch.rand(lse.shape) < 0.33
        lse[empty] = -torch.inf
        o[empty] = NAN
    return os, lses


def check(out, lse, os, lses, dtype):
    want, want_lse = merge_ref([o.nan_to_num() for o in os], lses)
    assert not torch.isnan(out).any()
    if out.numel():
        assert float((out.double() - want).abs().max()) <= TOLERANCE[dtype] * max(
            1.0, float(want.abs().max())
        )
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.all(out[empty] == 0)
    torch.testing.assert_close(lse.double()[~empty], want_lse[~empty], rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 3, 64), (33, 4, 80), (0, 2, 64)], ids=str)
def test_merge(isa, dtype, n, shape):
    os, lses = states(n, *shape, dtype)
    out, lse = torch.full(shape, NAN, dtype=dtype), torch.full(shape[:2], NAN)
    merge_n_states(os, lses, out=out, lse_out=lse)
    check(out, lse, os, lses, dtype)


def test_two_with_defaults_and_threads():
    os, lses = states(2, 300, 4, 64, torch.bfloat16)
    out, lse = merge_states(os[0], lses[0], os[1], lses[1], threads=2)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    check(out, lse, os, lses, torch.bfloat16)


def test_in_place_and_mixed_dtypes(isa):
    """A bfloat16 part merged into a float32 accumulator."""
    os, lses = states(2, 20, 4, 64, torch.float32)
    os[1] = os[1].bfloat16()
    acc, acc_lse = os[0].clone(), lses[0].clone()
    merge_states(acc, acc_lse, os[1], lses[1], out=acc, lse_out=acc_lse)
    check(acc, acc_lse, os, lses, torch.float32)


def test_strided(isa):
    os, lses = states(2, 6, 4, 32, torch.float32)
    views = [o.transpose(0, 1).contiguous().transpose(0, 1) for o in os]
    lse_views = [x.T.contiguous().T for x in lses]
    out, lse = merge_n_states(views, lse_views)
    check(out, lse, os, lses, torch.float32)


def test_extreme_lse(isa):
    """Far apart, the smaller one vanishes; both huge, nothing overflows."""
    o = [torch.ones(1, 1, 8), torch.full((1, 1, 8), 3.0)]
    for a, b, want in ((1e4, -1e4, 1.0), (3e38, 3e38, 2.0), (-3e38, -3e38, 2.0)):
        out, lse = merge_states(o[0], torch.full((1, 1), a), o[1], torch.full((1, 1), b))
        assert torch.all(out == want) and torch.isfinite(lse).all()


def test_associative():
    os, lses = states(3, 10, 2, 64, torch.float32)
    ab = merge_states(os[0], lses[0], os[1], lses[1])
    left = merge_states(*ab, os[2], lses[2])
    bc = merge_states(os[1], lses[1], os[2], lses[2])
    right = merge_states(os[0], lses[0], *bc)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        lambda o, s: ([], []),
        lambda o, s: ([o, o], [s]),
        lambda o, s: ([o, o[:1]], [s, s]),
        lambda o, s: ([o, o], [s, s[:, :1]]),
        lambda o, s: ([o, o.double()], [s, s]),
        lambda o, s: ([o, o], [s, s.bfloat16()]),
        lambda o, s: ([o] * 257, [s] * 257),
        lambda o, s: ([o[0], o[0]], [s, s]),
    ],
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError):
        merge_n_states(*bad(torch.zeros(2, 3, 8), torch.zeros(2, 3)))

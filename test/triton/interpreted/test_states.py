"""Merging and packing of partials against fp64, with rows that saw nothing and NaN under them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sps_runtime.attention.sequence_parallel.exact.partials import pack, unpack
from sps_runtime.ops import reference
from sps_runtime.ops.triton.states import merge_states, pack_partial

Partial = tuple[Tensor, Tensor]


def partial_of(spread: float, dtype: torch.dtype, tokens: int = 7, dim: int = 24) -> Partial:
    """A third of the rows saw no key: lse is -inf, and o was never written."""
    o, lse = torch.randn(tokens, 9, dim).to(dtype)[:, 2:7], torch.randn(tokens, 5) * spread
    unseen = torch.rand(lse.shape) < 0.33
    o[unseen], lse[unseen] = torch.nan, -torch.inf
    return o, lse


def truth(parts: list[Partial]) -> Partial:
    o, lse = (torch.stack(side) for side in zip(*parts, strict=True))
    return reference.merge(o.nan_to_num(), lse)


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge(count: int, spread: float) -> None:
    parts = [partial_of(spread, (torch.float32, torch.bfloat16)[i % 2]) for i in range(count)]
    want_o, want_lse = truth(parts)
    out = torch.full((7, 5, 24), torch.nan)
    lse = merge_states(parts, out)
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, want_o.float(), rtol=0, atol=max(1e-5, spread * 1e-6))


def test_merge_in_place_and_rounded() -> None:
    parts = [partial_of(1.0, torch.float32) for _ in range(2)]
    want_o, want_lse = truth(parts)
    rounded = torch.empty(7, 5, 24, dtype=torch.bfloat16)
    merge_states(parts, rounded)
    torch.testing.assert_close(rounded, want_o.bfloat16(), rtol=0.01, atol=1e-5)
    o, lse = parts[0]
    assert merge_states(parts, o, lse) is lse
    torch.testing.assert_close(o, want_o.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=0, atol=1e-5)


def test_no_rows() -> None:
    nothing = torch.zeros(0, 4, 8), torch.zeros(0, 4)
    assert merge_states([nothing, nothing], torch.zeros(0, 4, 8)).shape == (0, 4)
    assert pack_partial(*nothing, torch.bfloat16).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [None, [3, 0, 6], []])
def test_messages_are_those_of_the_wire(dtype: torch.dtype, index: list[int] | None) -> None:
    o, lse = partial_of(3.0, torch.float32)
    rows = None if index is None else torch.tensor(index, dtype=torch.int64)
    got = pack_partial(o, lse, dtype, rows)
    taken = (o, lse) if rows is None else (o[rows], lse[rows])
    clean = taken[0].masked_fill(taken[1].isneginf()[..., None], 0.0)
    assert torch.equal(got, pack(clean, taken[1], dtype))
    back = unpack(got, *taken[0].shape, dtype)
    assert torch.equal(back.lse, taken[1]) and torch.equal(back.o, clean.to(dtype))

"""Merging is the reduction that everything stands on: associative, commutative, never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sps_runtime.ops import reference
from sps_runtime.ops.merge_state import merge_rows_, merge_state, merge_states

NO_EXPLAIN = [phase for phase in Phase if phase is not Phase.explain]
LSES = st.one_of(
    st.floats(-1e4, 1e4), st.just(-math.inf), st.sampled_from([0.0, -1e4, 1e4, 88.0, -104.0])
)


@st.composite
def partials(draw: st.DrawFn, least: int = 1, most: int = 5) -> list[tuple[Tensor, Tensor]]:
    count = draw(st.integers(least, most))
    lses = draw(st.lists(st.lists(LSES, min_size=6, max_size=6), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for values in lses:
        lse = torch.tensor(values, dtype=torch.float32).view(3, 2)
        o = torch.randn(3, 2, 4, generator=generator)
        made.append((torch.where(lse.isneginf()[..., None], 0.0, o), lse))
    return made


def agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    """Equal up to fp32: an lse of 10,000 has a step of 0.001, an error of 0.1% in a weight."""
    finite = b[1][b[1].isfinite()].abs().float()
    step = 2e-6 + 4 * 2**-24 * float(finite.max() if len(finite) else 0)
    torch.testing.assert_close(a[0], b[0].float(), rtol=0, atol=4 * step)
    torch.testing.assert_close(a[1], b[1].float(), rtol=0, atol=step)


@settings(deadline=None, max_examples=200, phases=NO_EXPLAIN)
@given(partials())
def test_any_number_equals_the_reference(parts: list[tuple[Tensor, Tensor]]) -> None:
    o, lse = reference.merge(*(torch.stack(side) for side in zip(*parts, strict=True)))
    merged = merge_states(parts)
    agree(merged, (o, lse))
    assert not merged[0].isnan().any() and not merged[1].isnan().any()


@settings(deadline=None, max_examples=100, phases=NO_EXPLAIN)
@given(partials(least=3, most=3))
def test_associative_and_commutative(parts: list[tuple[Tensor, Tensor]]) -> None:
    a, b, c = parts
    agree(merge_state(*merge_state(*a, *b), *c), merge_state(*a, *merge_state(*b, *c)))
    agree(merge_state(*a, *b), merge_state(*b, *a))


def test_an_empty_partial_changes_nothing_bit_for_bit() -> None:
    o, lse = torch.randn(5, 2, 8), torch.randn(5, 2) * 1000
    empty = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    for merged in (merge_state(o, lse, *empty), merge_state(*empty, o, lse)):
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)
    nothing = merge_state(*empty, *empty)
    assert torch.equal(nothing[0], empty[0]) and torch.equal(nothing[1], empty[1])


def test_rows_are_merged_in_place_and_others_left() -> None:
    o, lse = torch.randn(6, 2, 4), torch.randn(6, 2)
    part = torch.randn(2, 2, 4), torch.randn(2, 2)
    rows = torch.tensor([4, 1])
    want_o, want_lse = o.clone(), lse.clone()
    want_o[rows], want_lse[rows] = merge_state(o[rows], lse[rows], *part)
    merge_rows_(o, lse, rows, *part)
    assert torch.equal(o, want_o) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_merged_segments_are_attention_over_all_keys(splits: int) -> None:
    generator = torch.Generator().manual_seed(splits)
    q, k, v = (torch.randn(40, heads, 16, generator=generator) for heads in (4, 2, 2))
    positions = torch.arange(40)
    whole = reference.attention(q, k, v, positions, positions, scale=0.25)
    parts = [
        reference.attention(q, k[cut], v[cut], positions, cut, scale=0.25)
        for cut in torch.randperm(40, generator=generator).tensor_split(splits)
    ]
    agree(merge_states(parts), whole)


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e4])
def test_kernels_and_torch_merge_alike(spread: float) -> None:
    kernels = pytest.importorskip("sps_kernel")
    parts = [(torch.randn(7, 4, 16), torch.randn(7, 4) * spread) for _ in range(4)]
    parts[2] = torch.zeros_like(parts[2][0]), torch.full((7, 4), -torch.inf)
    merged = kernels.merge_n_states([o for o, _ in parts], [lse for _, lse in parts])
    agree(merged, merge_states(parts))

"""Selection, estimators and tail in plain torch: the properties that kernels will be held to."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sps_runtime.ops import reference
from sps_runtime.ops.merge_state import merge_states
from sps_runtime.sparse.estimators.bounds import ExactMass, MinMax, SketchedKeys
from sps_runtime.sparse.estimators.mixtures import Largest
from sps_runtime.sparse.estimators.moments import Deviants, MeanKey, MeanVariance, PartMeans
from sps_runtime.sparse.estimators.patterns import Antidiagonal, VerticalSlash
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.reference import dropped_mass, own_block, sparse_attention
from sps_runtime.sparse.selection import SelectionSettings, narrow, page_shares, select
from sps_runtime.sparse.summaries import PageSummaries, paged, share_of_kv, summarise
from sps_runtime.sparse.tail import TAIL_NEEDS, tail_partial

PAGE, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
SCALE = DIM**-0.5
ALL = frozenset().union(
    *TAIL_NEEDS.values(), *(e.needs for e in (MinMax(), SketchedKeys(), ExactMass()))
)
ESTIMATORS: list[Estimator] = [
    MeanKey(),
    MeanVariance(),
    MeanVariance(1.0),
    Deviants(2),
    PartMeans(),
    MinMax(),
    SketchedKeys(),
    ExactMass(),
    Antidiagonal(4),
    Largest((MeanKey(), Deviants(1))),
]
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, tokens: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, HEADS, DIM, generator=generator) * sharpness
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, generator=generator)
    return q, k, v


def summaries(k_SKD: Tensor, v_SKD: Tensor) -> PageSummaries:
    k, counts = paged(k_SKD, PAGE)
    return summarise(k, paged(v_SKD, PAGE)[0], counts, ALL)


def run(
    q: Tensor, k: Tensor, v: Tensor, estimator: Estimator | None, chosen: SelectionSettings, **more
):
    options = {"start": 0, "scale": SCALE, "page_size": PAGE, **more}
    return sparse_attention(q, k, v, summaries(k, v), estimator, chosen, **options)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(len(q))
    return reference.attention(q, k, v, at, at, scale=SCALE)


def chosen(**changes) -> SelectionSettings:
    return SelectionSettings(**{"block": PAGE, "minimum": 1, "window": 1, **changes})


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("block", [PAGE, 2 * PAGE])
@pytest.mark.parametrize("tokens", [5 * PAGE, 5 * PAGE + 3, 3])
def test_tau_of_zero_is_exact(estimator: Estimator, block: int, tokens: int) -> None:
    q, k, v = draw(1, tokens)
    found = run(q, k, v, estimator, chosen(tau=0.0, block=block))
    o, lse = exact(q, k, v)
    assert all(bool(kept.all()) for _, kept in found.kept)
    torch.testing.assert_close(found.o_THD, o, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.lse_TH, lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@settings(max_examples=6, deadline=None)
@given(seed=seeds, cuts=st.sets(st.integers(1, 9), max_size=3), tau=st.floats(0.01, 0.5))
def test_selection_does_not_depend_on_chunks(
    estimator: Estimator, seed: int, cuts: set[int], tau: float
) -> None:
    tokens = 9 * PAGE + 5
    q, k, v = draw(seed, tokens)
    setting = chosen(tau=tau, representatives=4 if not isinstance(estimator, Antidiagonal) else 0)
    whole = run(q, k, v, estimator, setting)
    ends = [0, *(cut * PAGE for cut in sorted(cuts)), tokens]
    parts = []
    for start, end in itertools.pairwise(ends):
        part = run(q[start:end], k[:end], v[:end], estimator, setting, start=start)
        parts.append(part)
    kept = [item for part in parts for item in part.kept]
    assert [number for number, _ in kept] == [number for number, _ in whole.kept]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(kept, whole.kept, strict=True))
    o = torch.cat([part.o_THD for part in parts])
    torch.testing.assert_close(o, whole.o_THD, atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(seed=seeds, tau=st.floats(0.0, 0.3), budget=st.floats(0.1, 0.9))
def test_blocks_of_a_superblock_share_what_they_fetch(seed: int, tau: float, budget: float) -> None:
    tokens, wide = 15 * PAGE + 3, 4 * PAGE
    q, k, v = draw(seed, tokens)
    setting = chosen(tau=tau, budget=budget, fetch_block=wide)
    whole = run(q, k, v, SketchedKeys(), setting)
    for first in range(0, 16, 4):
        sets = [kept[:, :first] for number, kept in whole.kept if first <= number < first + 4]
        most = max(2, -(-budget * first // 1))
        assert int(torch.stack(sets).any(0).sum(-1).max()) <= most or first == 0
    parts = [
        run(q[a:b], k[:b], v[:b], SketchedKeys(), setting, start=a)
        for a, b in ((0, wide), (wide, 3 * wide), (3 * wide, tokens))
    ]
    kept = [item for part in parts for item in part.kept]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(kept, whole.kept, strict=True))
    with pytest.raises(ValueError, match="does not begin with a block"):
        run(q[PAGE:], k, v, SketchedKeys(), setting, start=PAGE)


def test_superblocks_keep_everything_at_tau_zero() -> None:
    q, k, v = draw(2, 9 * PAGE + 5)
    found = run(q, k, v, MeanKey(), chosen(tau=0.0, fetch_block=2 * PAGE))
    torch.testing.assert_close(found.o_THD, exact(q, k, v)[0], atol=2e-6, rtol=1e-5)


def test_a_chunk_inside_a_block_is_refused() -> None:
    q, k, v = draw(0, 2 * PAGE)
    with pytest.raises(ValueError, match="does not begin with a block"):
        run(q[4:], k, v, MeanKey(), chosen(), start=4)


def test_summaries_do_not_depend_on_who_computes_them() -> None:
    """Page by page, as ranks write them, and with rubbish where a short page has no tokens."""
    _, k, v = draw(3, 4 * PAGE + 3)
    (pages_k, counts), (pages_v, _) = paged(k, PAGE), paged(v, PAGE)
    whole = summarise(pages_k, pages_v, counts, ALL)
    pages_k[-1, :, 3:], pages_v[-1, :, 3:] = 1e6, -1e6
    for page in range(5):
        at = slice(page, page + 1)
        one = summarise(pages_k[at], pages_v[at], counts[at], ALL)
        for name in ALL - {"keys_NKBD", "sketch_NKBR"}:
            torch.testing.assert_close(one.get(name), whole.get(name)[at])
        held = counts[page]
        sketched = one.get("sketch_NKBR")[:, :, :held]
        torch.testing.assert_close(sketched, whole.get("sketch_NKBR")[at][:, :, :held])


def test_a_summary_that_was_not_computed_is_refused() -> None:
    k, counts = paged(draw(0, PAGE)[1], PAGE)
    with pytest.raises(ValueError, match="lack variance_NKD"):
        summarise(k, k, counts).get("variance_NKD")


@settings(max_examples=40, deadline=None)
@given(seed=seeds, tail=st.sampled_from(["none", *TAIL_NEEDS]), sharpness=st.floats(0.1, 8.0))
def test_the_error_is_within_dropped_mass_times_diameter(
    seed: int, tail: str, sharpness: float
) -> None:
    """|o - o_exact| <= max(tau, tau') diam(V): with no tail that is tau diam(V)."""
    q, k, v = draw(seed, 8 * PAGE, sharpness)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(KV_HEADS, 7, generator=generator) < 0.4
    o, lse, own, block = merged(q, k, v, kept, tail)
    taus = dropped_mass(block, own[1], paged(k, PAGE)[0][:7], kept)
    if tail != "none":
        pages = summaries(k, v).first(7)
        taus = torch.maximum(taus, torch.exp(tail_partial(block, pages, kept, tail)[1] - lse))
    truth = exact(q, k, v)[0][-PAGE:].unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3)
    error = (o - truth).norm(dim=-1)
    diameter = torch.cdist(v.transpose(0, 1), v.transpose(0, 1)).amax((1, 2))
    assert bool((error <= taus * diameter[:, None, None] * (1 + 1e-4) + 1e-5).all())


def merged(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, tail: str):
    """The last block's attention over its own page, kept ones and the tail."""
    from sps_runtime.sparse.reference import kept_partial

    block = q[-PAGE:].unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3) * SCALE
    (k_pages, counts), (v_pages, _) = paged(k, PAGE), paged(v, PAGE)
    own = own_block(block, k_pages[-1:], v_pages[-1:], counts[-1:])
    partials = [own, kept_partial(block, k_pages, v_pages, kept)]
    if tail != "none":
        partials.append(tail_partial(block, summaries(k, v).first(7), kept, tail))
    return *merge_states(partials), own, block


@pytest.mark.parametrize("tail", sorted(set(TAIL_NEEDS) - {"none"}))
def test_the_tail_is_exact_on_pages_of_equal_tokens(tail: str) -> None:
    q, k, v = draw(5, 8 * PAGE)
    k, v = (x[::PAGE].repeat_interleave(PAGE, 0) for x in (k, v))
    o, lse, _, _ = merged(q, k, v, torch.zeros(KV_HEADS, 7, dtype=torch.bool), tail)
    truth, total = exact(q, k, v)
    expected = truth[-PAGE:].unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3)
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(lse.flatten(0, 1).T, total[-PAGE:], atol=1e-5)


def test_a_tail_of_nothing_changes_nothing() -> None:
    q, k, v = draw(5, 8 * PAGE)
    everything = torch.ones(KV_HEADS, 7, dtype=torch.bool)
    o, lse, _, _ = merged(q, k, v, everything, "mean")
    without = merged(q, k, v, everything, "none")
    torch.testing.assert_close((o, lse), without[:2])
    assert bool(o.isfinite().all())


@pytest.mark.parametrize("height", [-1e4, 1e4])
def test_merging_is_stable_and_associative_far_from_zero(height: float) -> None:
    generator = torch.Generator().manual_seed(7)
    o = torch.randn(4, 3, 2, 5, generator=generator)
    lse = torch.randn(4, 3, 2, generator=generator) + height
    lse[2] = -torch.inf
    parts = list(zip(o, lse, strict=True))
    left = merge_states(parts)
    right = merge_states([parts[0], merge_states(parts[1:])])
    torch.testing.assert_close(left, right, atol=2e-3, rtol=1e-5)
    assert bool(left[0].isfinite().all())


def block_queries(seed: int, sharpness: float = 2.0) -> tuple[Tensor, PageSummaries]:
    q, k, v = draw(seed, 6 * PAGE, sharpness)
    block = q[-PAGE:].unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3) * SCALE
    return block, summaries(k, v)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sharpness=st.floats(0.1, 6.0))
def test_estimates_lie_on_their_side_of_the_truth(seed: int, sharpness: float) -> None:
    block, pages = block_queries(seed, sharpness)
    truth = ExactMass().log_mass(block, pages)
    assert bool((MeanKey().log_mass(block, pages) <= truth + 1e-4).all())
    assert bool((PartMeans().log_mass(block, pages) <= truth + 1e-4).all())
    assert bool((MinMax().log_mass(block, pages) >= truth - 1e-4).all())
    fine = summarise(
        pages.get("keys_NKBD"), pages.get("keys_NKBD"), pages.counts_N, ALL, sketch_bits=12
    )
    close = SketchedKeys().log_mass(block, fine)
    torch.testing.assert_close(close, truth, atol=2e-2, rtol=1e-3)


def test_a_needle_is_seen_by_deviants_and_sketch_and_not_by_the_mean() -> None:
    _, k, v = draw(11, 6 * PAGE, 1.0)
    k *= 0.3
    k[2 * PAGE + 3] = 4.0
    pages = summaries(k, v)
    q = torch.full((KV_HEADS, 2, 1, DIM), 1.0) * SCALE
    truth = ExactMass().log_mass(q, pages)[..., 2]
    for estimator, within in ((Deviants(1), 0.1), (SketchedKeys(), 0.7)):
        assert bool(((estimator.log_mass(q, pages)[..., 2] - truth).abs() < within).all())
    assert bool((MeanKey().log_mass(q, pages)[..., 2] < truth - 5).all())


def test_the_probe_gives_what_the_last_block_attends_to() -> None:
    q, k, v = draw(13, 6 * PAGE)
    block = q[-PAGE:].unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3) * SCALE
    pages, counts = paged(k, PAGE)
    probe = VerticalSlash.probe(block, pages, counts, slashes=False)
    at = torch.arange(6 * PAGE)
    one_hot = torch.eye(6).repeat_interleave(PAGE, 0)[:, None].expand(-1, KV_HEADS, -1)
    shares, _ = reference.attention(q[-PAGE:], k, one_hot, at[-PAGE:], at, scale=SCALE)
    expected = shares.unflatten(1, (KV_HEADS, -1)).mean((0, 2))
    torch.testing.assert_close(probe.vertical_KN, expected, atol=1e-5, rtol=1e-4)
    first = summaries(k, v).first(4)
    seen = probe.log_mass(block, first)[0, 0, 0].softmax(-1)
    torch.testing.assert_close(seen, expected[0, :4] / expected[0, :4].sum(), atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, tau=st.floats(0.0, 0.9), budget=st.floats(0.05, 1.0), pages=st.integers(1, 40))
def test_selection_is_the_smallest_that_suffices(
    seed: int, tau: float, budget: float, pages: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(2, pages, generator=generator).square()
    setting = chosen(tau=tau, budget=budget, sink=1, window=1)
    kept = select(share, 1, setting)
    assert bool(kept[:, 0].all()) and bool(kept[:, -1].all())
    for head in range(2):
        count, gone = int(kept[head].sum()), share[head, ~kept[head]]
        limit = max(2, -(-budget * (pages + 1) // 1) - 1)
        assert count <= max(limit, 1) or (tau <= 0 and budget >= 1)
        free = kept[head].clone()
        free[0] = free[-1] = False
        if len(gone) and free.any():
            assert float(share[head, free].min()) >= float(gone.max())
            smaller = float(gone.sum() + share[head, free].min())
            assert tau == 0 or smaller > tau * (1 - 1e-5)
        if count < limit:
            assert float(gone.sum()) <= tau + 1e-5


def test_of_equal_shares_the_earlier_page_goes_first() -> None:
    kept = select(torch.full((1, 10), 0.1), 1, chosen(tau=0.0, budget=5 / 11, window=1))
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 2, 9]


def test_dispersed_pages_are_kept() -> None:
    kept = select(torch.zeros(1, 12), 1, chosen(tau=0.5, dispersed=4))
    assert kept[0].nonzero()[:, 0].tolist() == [0, 4, 8, 11]


def test_shares_count_what_a_block_finds_at_home() -> None:
    """Rows that find everything in their own block want no page."""
    mass = torch.zeros(1, 1, 2, 3)
    assert float(page_shares(mass, torch.full((1, 1, 2), 20.0)).max()) < 1e-8
    away = torch.full((1, 1, 2), -torch.inf)
    for reduce, share in (("max", 1 / 3), ("mean", 1 / 3), ("norm", 2**0.5 / 3)):
        alone = page_shares(mass, away, reduce)
        torch.testing.assert_close(alone, torch.full((1, 3), share))


def test_norm_adds_what_rows_and_blocks_want_together() -> None:
    """A page that several rows want, each a little less, goes before one that a single row wants;
    rows' largest need decides it where `max` reduces."""
    mass = torch.full((1, 1, 4, 8), 0.01)
    mass[0, 0, :3, 4] = 0.8
    mass[0, 0, 3, 5] = 0.95
    away = torch.full((1, 1, 4), -torch.inf)
    given = {"tau": 0.0, "budget": 0.0, "minimum": 1, "sink": 0, "window": 0}
    for reduce, page in (("norm", 4), ("max", 5)):
        settings = SelectionSettings(**given, reduce=reduce)
        kept = select(page_shares(mass.log(), away, reduce), 0, settings)
        assert kept[0].nonzero().flatten().tolist() == [page]
        blocks = [page_shares(mass[:, :, row : row + 1].log(), away[:, :, :1]) for row in range(4)]
        common = narrow(blocks, 8, settings)
        assert [int(share.isfinite().sum()) for share in common] == [1] * 4
        assert all(bool(share[0, page].isfinite()) for share in common)


@pytest.mark.parametrize(
    ("needs", "share"),
    [
        (MeanKey().needs | TAIL_NEEDS["mean"], 2 / 128),
        (SketchedKeys().needs, 10 / 128),
        (MinMax().needs, 2 / 128),
        (ExactMass().needs, 0.5),
    ],
)
def test_summaries_cost_a_share_of_the_kv(needs: frozenset[str], share: float) -> None:
    assert share_of_kv(needs, 64) == pytest.approx(share)

"""What is measured of dropped pages is true, and what a request bounds is held."""

from __future__ import annotations

import math
from functools import cache

import msgspec
import pytest
import torch
from benchmark.gate_capture import EmbeddedModel
from test.dist.sparse_case import LAYERS, SETTINGS, Outcome, Prompt, SparseCase
from torch import Tensor

from sps_runtime.attention.sparse_audit import spread
from sps_runtime.attention.sparse_samples import LAST_ROWS, ROWS, SHARE
from sps_runtime.ops import reference
from sps_runtime.sparse.audit import RECORD, audit, sampled
from sps_runtime.sparse.estimators.bounds import SketchedKeys
from sps_runtime.sparse.reference import Block, choose, dropped_mass
from sps_runtime.sparse.summaries import PageSummaries, paged, summarise
from sps_runtime.sparse.torch_operators import selection_settings
from sps_runtime.types.attention import AttentionSpec, SparseSettings

BOUND = 2e-5


def settled(**changes: object) -> AttentionSpec:
    return AttentionSpec("csa", msgspec.structs.replace(SETTINGS, **changes))


def records(found: Outcome, slot: int = 0) -> dict[tuple[int, int, int], tuple[float, float]]:
    taken = list(RECORD.iter_unpack(found.counters[slot].audits))
    assert len({record[:3] for record in taken}) == len(taken)
    return {record[:3]: record[3:] for record in taken}


class Truth:
    """One layer of a case's first prompt, block by block."""

    def __init__(self, case: SparseCase, layer: int) -> None:
        self.case, self.layer = case, layer
        self.tokens = case.prompts[0].tokens
        k, v = case.k[0][layer].float(), case.v[0][layer].float()
        self.k, self.counts = paged(k, case.page)
        self.v, _ = paged(v, case.page)
        needs = {"mean_k_NKD", "mean_v_NKD", *SketchedKeys.needs}
        self.known: PageSummaries = summarise(self.k, self.v, self.counts, needs)
        q = case.q[0][layer].float().unflatten(1, (case.kv_heads, -1)).permute(1, 2, 0, 3)
        self.q_KGTD = q * case.dim**-0.5

    def superblock(self, begin: int, settings: SparseSettings) -> list[Block]:
        stop = min(begin + settings.superblock_at(begin), self.tokens)
        return [
            Block.of(self.q_KGTD[:, :, at:stop], at, self.k, self.v, self.counts, settings.block)
            for at in range(begin, stop, settings.block)
        ]

    def choose(self, begin: int, settings: SparseSettings) -> list[Tensor]:
        blocks = self.superblock(begin, settings)
        tokens = sum(block.q_KGTD.shape[2] for block in blocks)
        chosen = selection_settings(settings, begin, self.case.page, tokens)
        return choose(blocks, self.known, SketchedKeys(), chosen)

    def taus(self, block: Block, kept_KN: Tensor) -> Tensor:
        """``[kv_heads, group, tokens]``."""
        before = self.k[: block.before]
        if not block.before:
            return torch.zeros(block.own[1].shape)
        return dropped_mass(block.q_KGTD, block.own[1], before, kept_KN)


@pytest.mark.parametrize("sp", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(), (128, 256)])
def test_a_sample_is_measured(sp: int, cuts: tuple[int, ...]) -> None:
    case = SparseCase([Prompt(1210, cuts)], sp=sp, data=2)
    found = records(case.run())
    last = 1210 // 32 * 32
    asked = {
        (layer, head, position)
        for layer in range(LAYERS)
        for position in range(32, 1210, 32)
        for head in range(2)
        if position == last or sampled(0, layer, head, position, SHARE)
    }
    assert set(found) == asked and len(asked) > 2 * LAYERS
    for layer in range(LAYERS):
        truth = Truth(case, layer)
        for _, head, position in (key for key in asked if key[0] == layer):
            begin = SETTINGS.align(position)
            index = (position - begin) // 32
            block = truth.superblock(begin, SETTINGS)[index]
            taus = truth.taus(block, truth.choose(begin, SETTINGS)[index])[head]
            rows = block.q_KGTD.shape[2]
            count = min(LAST_ROWS if position == last else ROWS, rows)
            taus = taus[:, torch.arange(1, count + 1) * rows // count - 1]
            mean, most = found[layer, head, position]
            assert math.isclose(mean, float(taus.mean()), abs_tol=1e-4)
            assert math.isclose(most, float(taus.max()), abs_tol=1e-4)
    assert max(most for _, most in found.values()) > 0.05


def test_tp_ranks_measure_their_own_heads() -> None:
    one = records(SparseCase([Prompt(485)], data=2).run())
    two = records(SparseCase([Prompt(485)], tp=2, data=2).run())
    assert one.keys() == two.keys()
    assert all(abs(one[key][0] - two[key][0]) < 1e-5 for key in one)


@pytest.mark.parametrize("max_tau", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("sp", "cuts"), [(1, ()), (2, (64, 256)), (4, (128,))])
def test_what_is_bounded_is_held(max_tau: float, sp: int, cuts: tuple[int, ...]) -> None:
    """Each superblock and head is its first choice, its wider one, or everything."""
    settings = msgspec.structs.replace(SETTINGS, max_tau=max_tau, tail="none", budget=0.2)
    case = SparseCase([Prompt(485, cuts, AttentionSpec("csa", settings))], sp=sp, data=4)
    outcome = case.run()
    found, fallbacks, read = records(outcome), 0, 0
    for layer in range(LAYERS):
        truth = Truth(case, layer)
        begins = sorted({settings.align(at) for at in range(0, 485, 32)})
        for begin in begins:
            blocks = truth.superblock(begin, settings)
            for head in range(2):
                kept, exact, tau = held(truth, begin, head, settings)
                fallbacks += exact
                read += sum(int(k.sum()) for k in kept)
                read += sum(-(-b.q_KGTD.shape[2] // case.page) for b in blocks)
                assert math.isclose(found[layer, head, begin][0], tau, abs_tol=1e-4)
                for block, pages in zip(blocks, kept, strict=True):
                    assert_rows(case, outcome, layer, head, block, pages, truth)
    assert (outcome.counters[0].fallbacks, outcome.counters[0].read_pairs) == (fallbacks, read)
    assert fallbacks > 0


def held(
    truth: Truth, begin: int, head: int, settings: SparseSettings
) -> tuple[list[Tensor], bool, float]:
    """The pages that each block of a superblock reads in the end, whether it is all of them, and
    the measured mean."""
    blocks = truth.superblock(begin, settings)
    tokens = sum(block.q_KGTD.shape[2] for block in blocks)
    rows = torch.from_numpy(spread(tokens, truth.layer, begin))
    for budget in (settings.budget, 2 * settings.budget):
        kept = truth.choose(begin, msgspec.structs.replace(settings, budget=budget))
        taus = torch.cat([truth.taus(b, k)[head] for b, k in zip(blocks, kept, strict=True)], -1)
        each = taus[:, rows].mean(0)
        mean, mine = float(each.mean()), [pages[head] for pages in kept]
        if all(bool(pages.all()) for pages in mine):
            return mine, False, mean
        if not audit(each.tolist()).exceeds(settings.max_tau):
            return mine, False, mean
    return [torch.ones(block.before, dtype=torch.bool) for block in blocks], True, 0.0


def assert_rows(
    case: SparseCase,
    outcome: Outcome,
    layer: int,
    head: int,
    block: Block,
    pages: Tensor,
    truth: Truth,
) -> None:
    kept = torch.zeros(case.kv_heads, block.before, dtype=torch.bool)
    kept[head] = pages
    want = block.attend(truth.k, truth.v, truth.known, kept, "none")[0][head]
    group = case.heads // case.kv_heads
    rows = slice(block.start, block.start + block.q_KGTD.shape[2])
    got = outcome.outs[0][layer, rows, head * group : (head + 1) * group].transpose(0, 1)
    torch.testing.assert_close(got, want, atol=BOUND, rtol=0)


@cache
def embedded() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of two of the embedded model's layers over the beginning of a document."""
    model = EmbeddedModel()
    prompt = model.prompts("lookalike", 1024, 1, "audit")[0].prompt
    layers = [layer for layer in model.capture(prompt, 4)[1:3]]
    q, k, v = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return q, k, v


@pytest.mark.parametrize("keys", ["random", "embedded"])
@pytest.mark.parametrize("tail", ["none", "mean"])
def test_errors_are_within_what_was_dropped(keys: str, tail: str) -> None:
    """|o - o_exact| <= tau * diam(V), and with a tail <= max(tau, the tail's share) * diam(V)."""
    given = embedded() if keys == "embedded" else None
    tokens = 900 if given is None else given[0].shape[1]
    more = {} if given is None else shape_of(given)
    spec = settled(tail=tail, budget=0.15, tau=0.3)
    case = SparseCase([Prompt(tokens, attention=spec)], sp=2, data=6, given=given, **more)
    found, worst = case.run(), 0.0
    at, group = torch.arange(tokens), case.heads // case.kv_heads
    for layer in range(LAYERS):
        truth = Truth(case, layer)
        q, k, v = (x[0][layer] for x in (case.q, case.k, case.v))
        exact, _ = reference.attention(q, k, v, at, at, scale=case.dim**-0.5)
        error = (found.outs[0][layer] - exact).norm(dim=-1)
        settings = spec.sparse
        for begin in sorted({settings.align(p) for p in range(0, tokens, 32)}):
            chosen = truth.choose(begin, settings)
            for block, kept in zip(truth.superblock(begin, settings), chosen, strict=True):
                taus = truth.taus(block, kept)
                if tail == "mean" and not bool(kept.all()):
                    taus = torch.maximum(taus, tail_share(truth, block, kept))
                rows = slice(block.start, block.start + taus.shape[2])
                for head in range(case.kv_heads):
                    values = v[: rows.stop, head]
                    diameter = torch.cdist(values, values).max()
                    bound = taus[head] * diameter
                    got = error[rows, head * group : (head + 1) * group].T
                    assert bool((got <= bound + 1e-4).all())
                    worst = max(worst, float(got.max()))
    assert worst > 0.01


def tail_share(truth: Truth, block: Block, kept: Tensor) -> Tensor:
    """What the tail gets of the weight."""
    pages = truth.known.first(block.before)
    mass = torch.einsum("kgtd,nkd->kgtn", block.q_KGTD, pages.get("mean_k_NKD"))
    mass = (mass + math.log(truth.case.page)).masked_fill(kept[:, None, None], -torch.inf)
    tail = mass.logsumexp(-1)
    read = block.attend(truth.k, truth.v, truth.known, kept, "none")[1]
    return torch.exp(tail - torch.logaddexp(read, tail))


def shape_of(given: tuple[Tensor, Tensor, Tensor]) -> dict[str, int]:
    return {"heads": given[0].shape[2], "kv_heads": given[1].shape[2], "dim": given[0].shape[3]}

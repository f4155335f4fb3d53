"""Block-sparse prefill over ranks is the reference's, whoever computes what."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch
from test.dist.sparse_case import CSA, LAYERS, SETTINGS, SLOTS, Outcome, Prompt, SparseCase

from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.ops import reference
from sps_runtime.sparse.audit import RECORD
from sps_runtime.sparse.kernel_operators import KernelSparseOperators
from sps_runtime.types.attention import EXACT, AttentionSpec

LONG = Prompt(485)
BOUND = 2e-5
"""fp32 outputs of order 1 may differ so much by the order of sums."""


def settled(**changes: object) -> AttentionSpec:
    return AttentionSpec("csa", msgspec.structs.replace(SETTINGS, **changes))


def assert_reference(
    case: SparseCase, found: Outcome, slot: int = 0, bound: float = BOUND
) -> None:
    for layer in range(LAYERS):
        want, kept = case.reference(slot, layer)
        torch.testing.assert_close(found.outs[slot][layer].float(), want, atol=bound, rtol=0)
        size = max(SETTINGS.block, case.page)
        for number, kept_KN in kept:
            position, stop = number * size, min((number + 1) * size, case.prompts[slot].tokens)
            own = frozenset(range(position, stop, case.page))
            if stop - position == 1 and position == SETTINGS.align(position):
                continue  # reads everything, as exact rows do
            for head, pages in enumerate(kept_KN):
                before = {page * case.page for page in pages.nonzero()[:, 0].tolist()}
                assert found.read[layer, slot, position, head] == own | before


@pytest.mark.parametrize("tokens", [5, 64, 65, 200, 256, 257, 485, 512])
@pytest.mark.parametrize("page", [16, 32])
def test_one_rank_is_the_reference(tokens: int, page: int) -> None:
    case = SparseCase([Prompt(tokens)], page=page, data=tokens)
    assert_reference(case, case.run())


@pytest.mark.parametrize("estimator", ["mean", "quest", "xattention", "oracle", "null"])
def test_other_estimators_are_the_reference(estimator: str) -> None:
    case = SparseCase([Prompt(300, attention=settled(estimator=estimator))], sp=2)
    assert_reference(case, case.run())


@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("cuts", [(), (256,), (64, 128, 384)])
@pytest.mark.parametrize("deal", [1, 2])
def test_choices_depend_on_neither_ranks_nor_chunks(
    sp: int, tp: int, cuts: tuple[int, ...], deal: int
) -> None:
    case = SparseCase([Prompt(485, cuts)], sp=sp, tp=tp, deal=deal, data=3)
    assert_reference(case, case.run())


def test_kernels_choose_the_same_at_every_degree() -> None:
    """Page for page: their shares are the same bits whoever computes them."""
    kernels = pytest.importorskip("sps_kernel")
    prompts = {"data": 3, "operators": KernelSparseOperators(kernels)}
    backend = KernelBackend(kernels)
    alone = SparseCase([Prompt(485)], backend=backend, **prompts).run()
    for sp, tp, cuts in ((1, 1, (64, 128, 384)), (2, 1, ()), (4, 1, (256,)), (2, 2, (128,))):
        case = SparseCase([Prompt(485, cuts)], sp=sp, tp=tp, backend=backend, **prompts)
        found = case.run()
        assert found.read == alone.read
        torch.testing.assert_close(found.outs[0], alone.outs[0], atol=BOUND, rtol=0)
    same = sum(
        len(alone.read[key] & pages) / len(alone.read[key] | pages)
        for key, pages in SparseCase([Prompt(485)], data=3).run().read.items()
    )
    assert same / len(alone.read) > 0.9, "kernels round rows to bytes; they choose otherwise seldom"


@pytest.mark.parametrize("groups", [((0, 1), (2,), (1, 3)), ((3,), (0, 2), (2,))])
def test_pages_of_earlier_groups_are_read_in_place(groups: tuple[tuple[int, ...], ...]) -> None:
    case = SparseCase([Prompt(485, (128, 384))], sp=4, groups=groups, data=13)
    found = case.run()
    assert_reference(case, found)
    assert found.attention_bytes == found.counters[0].remote_bytes > 0


@pytest.mark.parametrize("tail", ["mean", "none"])
def test_mixed_steps(tail: str) -> None:
    """Sparse prompts of two kinds beside exact ones, some of which end sooner."""
    prompts = [
        Prompt(200, (64,), settled(tail=tail)),
        Prompt(70, (7,), EXACT),
        Prompt(485, (128, 256), settled(budget=0.5)),
        Prompt(33, (32,), EXACT),
        Prompt(193, (64, 192), settled(tail=tail)),
    ]
    case = SparseCase(prompts, sp=2, data=5)
    found = case.run()
    for slot, prompt in enumerate(prompts):
        if prompt.attention == EXACT:
            assert_exact(case, found, slot)
        else:
            assert_reference(case, found, slot)
    assert set(found.counters) == {0, 2, 4}


def assert_exact(case: SparseCase, found: Outcome, slot: int, window: int | None = None) -> None:
    at = torch.arange(case.prompts[slot].tokens)
    for layer, seen in enumerate((window, None)):
        q, k, v = (x[slot][layer] for x in (case.q, case.k, case.v))
        want, _ = reference.attention(q, k, v, at, at, scale=case.dim**-0.5, window=seen)
        torch.testing.assert_close(found.outs[slot][layer], want, atol=BOUND, rtol=0)


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_tau_of_zero_and_a_whole_budget_is_exact(sp: int) -> None:
    case = SparseCase([Prompt(300, (128,), settled(tau=0.0, budget=1.0))], sp=sp, data=7)
    found = case.run()
    assert_exact(case, found, 0)
    counters = found.counters[0]
    assert counters.read_pairs == counters.causal_pairs
    assert counters.fetched_units == counters.remote_units
    assert (counters.remote_units > 0) == (sp > 1)


def test_layers_with_a_window_read_all_of_it() -> None:
    case = SparseCase([Prompt(300, (128,))], sp=2, window=40, data=8)
    found = case.run()
    at = torch.arange(300)
    q, k, v = (x[0][0] for x in (case.q, case.k, case.v))
    want, _ = reference.attention(q, k, v, at, at, scale=case.dim**-0.5, window=40)
    torch.testing.assert_close(found.outs[0][0], want, atol=BOUND, rtol=0)
    torch.testing.assert_close(found.outs[0][1], case.reference(0, 1)[0], atol=BOUND, rtol=0)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("deal", range(3))
def test_bytes_are_counted(deal: int, from_start: bool) -> None:
    """From what each block read, by hand: every (page, KV head) of another rank once a step and
    layer, every summary that comes in this step, and rows that are measured at other ranks."""
    case = SparseCase(
        [Prompt(485, (64, 256))], sp=4, deal=deal, data=9, summaries_from_start=from_start
    )
    found = case.run()
    owner = [page // SLOTS for page in case.pages[0]]
    fetched: set[tuple[int, ...]] = set()
    summaries = {  # to all ranks, while the prompt goes on
        (layer, step, reader, p, head)
        for layer, step, reader, head in itertools.product(range(2), range(2), range(4), range(2))
        for p in range((0, 64)[step] if from_start else 0, (64, 256)[step], 16)
        if owner[p // 16] != reader
    }
    remote: set[tuple[int, ...]] = set()
    routed = 0
    asked = {record[:3] for record in RECORD.iter_unpack(found.counters[0].audits)}
    pairs = causal = 0
    for (layer, _, position, head), pages in found.read.items():
        step = sum(position >= cut for cut in (64, 256))
        reader = owner[position // 16]
        fetched |= {
            (layer, step, reader, p, head) for p in pages if owner[p // 16] != reader
        }
        ahead = {
            (layer, step, reader, p, head)
            for p in range(0, position, 16)
            if owner[p // 16] != reader
        }
        remote |= ahead
        if step == 2:
            summaries |= {unit for unit in ahead if unit[3] >= 256 or not from_start}
        if (layer, head, position) in asked:
            rows = min(16 if position == 480 else 8, 485 - position)
            owners = {owner[p // 16] for p in range(0, position, 16)} - {reader}
            routed += len(owners) * rows * 2 * (4 * case.dim + 4)
        pairs += len(pages)
        causal += -(-min(position + 32, 485) // 16)
    counters = found.counters[0]
    assert (counters.read_pairs, counters.causal_pairs) == (pairs, causal)
    assert (counters.fetched_units, counters.remote_units) == (len(fetched), len(remote))
    page_bytes = 2 * 16 * case.dim * 4
    nbytes = case.operators.summary_nbytes(16, case.dim, 4)
    read = len(fetched) * page_bytes + len(summaries) * nbytes
    assert routed and counters.remote_bytes == read + routed
    assert found.attention_bytes == counters.remote_bytes
    assert 0 < len(fetched) < len(remote)


def test_a_cut_superblock_is_refused() -> None:
    case = SparseCase([Prompt(200, (64,))], sp=2)
    case.pages[0][5] = (case.pages[0][4] // SLOTS ^ 1) * SLOTS + 63
    with pytest.raises(ValueError, match="cuts a superblock"):
        case.run()


def test_bf16_is_the_reference_over_rounded_summaries() -> None:
    case = SparseCase([Prompt(485, attention=CSA)], sp=2, dtype=torch.bfloat16, data=11)
    assert_reference(case, case.run(), bound=3e-2)

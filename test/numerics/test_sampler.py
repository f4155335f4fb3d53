"""The sampler against direct computation, transformers, and statistics."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sps_runtime.grammar.protocol import GrammarError
from sps_runtime.runner.logit_edits import edit_row
from sps_runtime.runner.philox import philox, uniform
from sps_runtime.runner.sampler import sample, sample_rows
from sps_runtime.runner.truncation import FIRST_LOOK, truncate
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

VOCAB = 50


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def planned(history: dict[int, int] | None = None, **params: Any) -> SamplePlan:
    own = {
        key: params.pop(key) for key in ("forbid_stop", "logprobs", "logprob_ids") if key in params
    }
    return SamplePlan(
        params=SamplingParams(**params),
        history_ids=pack_ids(history or {}),
        history_counts=pack_ids((history or {}).values()),
        **own,
    )


def choose(logits_RV: Tensor, samples: list[SamplePlan], positions: list[int]) -> list[int]:
    return sample_rows(logits_RV, samples, positions, [None] * len(samples)).tolist()


def edited(logit_V: Tensor, plan: SamplePlan, board_token: int | None = None) -> Tensor:
    changed = logit_V.clone()
    edit_row(changed, plan, board_token)
    return changed


def test_philox_known_answers() -> None:
    """From Random123's kat_vectors, philox4x32-10."""
    rows = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    counter = tuple(np.array([row[0][i] for row in rows], dtype=np.uint64) for i in range(4))
    key = tuple(np.array([row[1][i] for row in rows], dtype=np.uint64) for i in range(2))
    words = philox(counter, key)
    for index, (_, _, expected) in enumerate(rows):
        assert " ".join(f"{int(word[index]):08x}" for word in words) == expected


def test_uniform_is_uniform_and_keyed_by_seed_and_position() -> None:
    numbers = uniform([7] * 20_000, range(20_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees: p < 1e-4 above 50
    assert len(set(numbers)) == len(numbers)
    assert uniform([7], [3])[0] == numbers[3]
    assert uniform([8], [3])[0] != numbers[3]
    assert uniform([7 + (1 << 32)], [3])[0] != numbers[3], "all 64 bits of a seed count"
    assert uniform([-1], [0])[0] == uniform([(1 << 64) - 1], [0])[0]


def test_greedy_is_argmax_of_any_dtype() -> None:
    logits = random_logits(5)
    greedy = [planned(temperature=0.0), planned(temperature=1e-7), planned(top_k=1)]
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits[:3].to(dtype)
        assert choose(rows, greedy, [1, 2, 3]) == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws (one row, all positions) against transformers' probabilities."""
    logits, draws = random_logits(1, seed=3), 20_000
    expected = warped(logits, params)[0].double()
    samples = [planned(seed=11, **params)] * draws
    counts = Counter(choose(logits.expand(draws, -1), samples, list(range(draws))))
    assert all(expected[token] > 0 for token in counts)
    common = [token for token in range(VOCAB) if expected[token] * draws >= 5]
    statistic = sum(
        (counts[token] - expected[token].item() * draws) ** 2 / (expected[token].item() * draws)
        for token in common
    )
    degrees = max(1, len(common) - 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def warped(logits: Tensor, params: dict[str, Any]) -> Tensor:
    """transformers' own truncation, as probabilities."""
    warpers = LogitsProcessorList()
    if params.get("top_k"):
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        warpers.append(MinPLogitsWarper(params["min_p"]))
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    return torch.softmax(warpers(ids, logits / params["temperature"]), -1)


@pytest.mark.parametrize("vocab", [VOCAB, 3 * FIRST_LOOK])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_truncation_is_that_of_transformers(vocab: int, scale: float) -> None:
    """Rows of all kinds in one batch; flat rows need top-p to look beyond the first ids."""
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 3},
        {"top_k": vocab + 5},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"top_p": 0.97, "top_k": 40},
        {"min_p": 0.3},
        {"top_k": 30, "top_p": 0.7, "min_p": 0.02},
    ]
    logits = random_logits(len(kinds), vocab, seed=9, scale=scale)
    found = truncate(logits, [SamplingParams(**kind) for kind in kinds])
    for row, kind in enumerate(kinds):
        expected = warped(logits[row : row + 1], {"temperature": 1.0, **kind})[0]
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-5)


def test_a_draw_depends_on_nothing_but_its_own_row() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.2, "top_p": 0.9, "seed": 6},
        {"temperature": 1.0, "top_k": 9, "frequency_penalty": 0.5, "seed": 7},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": {3: 2.0}, "seed": 5},
    ]
    samples = [planned({1: 2, 8: 0}, **kind) for kind in kinds] * 8
    positions = [index // len(kinds) for index in range(len(samples))]
    logits = random_logits(len(samples), 2 * FIRST_LOOK, seed=4)
    together = choose(logits, samples, positions)
    alone = [
        choose(logits[row : row + 1], [samples[row]], [positions[row]])[0]
        for row in range(len(samples))
    ]
    backwards = choose(logits.flip(0), samples[::-1], positions[::-1])[::-1]
    assert together == alone == backwards
    assert len(set(together)) > len(kinds)


def test_nearly_equal_logits_draw_equal_tokens() -> None:
    """Other degrees sum in other orders; a seeded draw must not turn on the last bits."""
    logits = random_logits(2000, seed=8)
    samples = [planned(seed=row, top_p=0.95) for row in range(len(logits))]
    noise = random_logits(2000, seed=1, scale=1e-6)
    first, second = (choose(x, samples, [9] * len(samples)) for x in (logits, logits + noise))
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 2


def test_penalties_directly() -> None:
    logit_V = random_logits(1, seed=2)[0]
    history = {4: 0, 7: 3, 30: 1}
    plan = planned(
        history,
        presence_penalty=0.7,
        frequency_penalty=0.3,
        repetition_penalty=1.5,
        logit_bias={7: 1.25, 11: -100.0},
        forbid_stop=(2, 30),
    )
    expected = logit_V.clone()
    for token, count in {**history, 7: 4}.items():
        value = expected[token]
        value = value / 1.5 if value > 0 else value * 1.5
        expected[token] = value - 0.3 * count - (0.7 if count else 0.0)
    expected[7] += 1.25
    expected[11] -= 100
    expected[2] = expected[30] = -torch.inf
    torch.testing.assert_close(edited(logit_V, plan, board_token=7), expected)


def test_a_token_from_the_board_counts_as_generated() -> None:
    logit_V = torch.zeros(VOCAB)
    plan = planned({4: 0, 7: 1}, frequency_penalty=1.0)
    cases: list[tuple[int | None, dict[int, float]]] = [
        (None, {7: -1.0}),
        (7, {7: -2.0}),
        (4, {4: -1.0, 7: -1.0}),
        (9, {7: -1.0, 9: -1.0}),
    ]
    for token, expected in cases:
        found = edited(logit_V, plan, token)
        assert {i: found[i].item() for i in found.nonzero()[:, 0].tolist()} == expected


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(1, seed=6)
    ids = [3, 9, 9, 27]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits.clone())[0]
    plan = planned({3: 0, 9: 2, 27: 0}, repetition_penalty=1.3)
    torch.testing.assert_close(edited(logits[0], plan), expected)


def test_forbidden_ids_are_never_drawn() -> None:
    logits = random_logits(1, seed=5)
    best = logits.topk(3).indices[0].tolist()
    for temperature in (0.0, 1.0):
        samples = [planned(temperature=temperature, seed=1, forbid_stop=tuple(best))] * 300
        drawn = set(choose(logits.expand(300, -1), samples, list(range(300))))
        assert drawn and not drawn & set(best)


def test_sampling_leaves_the_logits_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(2).to(dtype)
        before = logits.clone()
        samples = [planned({1: 1}, presence_penalty=1.0), planned(logit_bias={0: 5.0}, top_p=0.5)]
        choose(logits, samples, [0, 0])
        assert torch.equal(logits, before)


def test_a_whole_step() -> None:
    """Slots, positions, board tokens and logprobs come from the plan's own sequences."""
    logits = random_logits(2, seed=12)
    wanting = planned(
        {5: 1}, temperature=0.0, frequency_penalty=2.0, logprobs=3, logprob_ids=(40, 2)
    )
    drawing = planned(temperature=1.0, seed=99)
    plan = StepPlan(
        epoch=4,
        group=(0,),
        sequences=(
            SequencePlan(slot=8, start=0, count=6, tokens=b"", pages=b""),
            SequencePlan(slot=3, start=10, count=1, tokens=b"", pages=b"", sample=drawing),
            SequencePlan(slot=6, start=20, count=1, tokens=b"", pages=b"", sample=wanting),
        ),
    )
    best = int(logits[1].argmax())
    first, second = sample(logits, plan, [1, 2], {2: best})
    assert (first.slot, second.slot) == (3, 6)
    assert first.logprobs is None
    assert first.token == choose(logits[:1], [drawing], [11])[0]
    penalised = edited(logits[1], wanting, best)
    assert penalised[best] < logits[1, best]
    assert second.token == int(penalised.argmax())
    report, scores = second.logprobs, torch.log_softmax(logits[1], -1)
    assert report is not None and report.token == second.token
    assert report.logprob == pytest.approx(scores[second.token].item(), abs=1e-6)
    top = scores.topk(3)
    assert [pair[0] for pair in report.top] == top.indices.tolist()
    assert [pair[1] for pair in report.top] == pytest.approx(top.values.tolist(), abs=1e-6)
    assert dict(report.wanted) == pytest.approx({i: scores[i].item() for i in (2, 40)}, abs=1e-6)
    assert report.wanted[0][1] >= report.wanted[1][1]


def test_a_number_on_a_boundary_draws_no_dropped_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 lies on the boundary of every id of mass 0 at the front."""
    monkeypatch.setattr("sps_runtime.runner.sampler.uniform", lambda seeds, _: np.zeros(len(seeds)))
    logits = random_logits(1, seed=5)
    forbidden = planned(forbid_stop=(0, 1))
    narrow = planned(top_k=2)
    assert choose(logits.expand(2, -1), [forbidden, narrow], [0, 0]) == [
        2,
        int(logits[0].topk(2).indices.min()),
    ]


def test_the_last_number_draws_the_last_kept_id(monkeypatch: pytest.MonkeyPatch) -> None:
    last = 1 - 2.0**-52
    monkeypatch.setattr(
        "sps_runtime.runner.sampler.uniform", lambda seeds, _: np.full(len(seeds), last)
    )
    logits = random_logits(1, vocab=5000, seed=5)
    kept = logits[0].topk(40).indices.max()
    assert choose(logits, [planned(top_k=40)], [0]) == [int(kept)]


def allowing(*ids: int) -> Any:
    mask = np.zeros(VOCAB, dtype=np.bool_)
    mask[list(ids)] = True
    return mask


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_a_grammar_allows_is_sampled(temperature: float) -> None:
    logits_RV = random_logits(300)
    before = logits_RV.clone()
    samples = [planned(temperature=temperature, seed=row, top_k=5) for row in range(300)]
    masks = [allowing(3, 7, 20)] * 150 + [None] * 150
    tokens = sample_rows(logits_RV, samples, list(range(300)), [None] * 300, masks)
    free = sample_rows(logits_RV, samples, list(range(300)), [None] * 300)
    assert set(tokens[:150].tolist()) == {3, 7, 20}
    assert torch.equal(tokens[150:], free[150:]) and torch.equal(logits_RV, before)


def test_a_grammar_comes_before_a_bias_and_after_a_ban() -> None:
    logits_RV = random_logits(3)
    samples = [
        planned(temperature=0, logit_bias={9: 100.0}),
        planned(temperature=0, forbid_stop=(3,)),
        planned(temperature=0, forbid_stop=(3, 4)),
    ]
    masks = [allowing(3, 4)] * 3
    tokens = sample_rows(logits_RV, samples, [0] * 3, [None] * 3, masks).tolist()
    assert tokens[0] in (3, 4) and tokens[1] == 4 and tokens[2] in (3, 4)


def test_a_grammar_that_allows_nothing_fails_its_own_row() -> None:
    sequences = tuple(
        SequencePlan(slot=slot, start=0, count=1, tokens=b"", pages=b"", sample=planned(seed=slot))
        for slot in range(2)
    )
    plan = StepPlan(epoch=1, group=(0,), sequences=sequences)
    masks = {1: GrammarError("nothing may follow")}
    fine, failed = sample(random_logits(2), plan, [0, 1], {}, masks)
    assert fine.failure is None and failed.failure == "nothing may follow"


def test_greedy_sequences_follow_their_grammars() -> None:
    """A step of greedy sequences alone is sampled on a shorter way."""
    greedy = planned(temperature=0, grammar="some grammar")
    sequence = SequencePlan(slot=0, start=0, count=1, tokens=b"", pages=b"", sample=greedy)
    plan = StepPlan(epoch=1, group=(0,), sequences=(sequence,))
    logits_RV = random_logits(1)
    (kept,) = sample(logits_RV, plan, [0], {}, {0: allowing(3)})
    assert kept.token == 3 and kept.failure is None
    (failed,) = sample(logits_RV, plan, [0], {}, {0: GrammarError("nothing may follow")})
    assert failed.failure == "nothing may follow"

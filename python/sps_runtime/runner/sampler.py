"""Choosing tokens.

Each row is decided by itself, so a token depends on its logits, its parameters, its seed and its
position alone, not on the batch, the device or the rank. A token is drawn by inverting the
cumulative distribution (fp64, in the order of ids) at one uniform number of a counter-based
generator: a small change of the logits then changes the token only with a probability as small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.grammar.protocol import Allowed, GrammarError
from sps_runtime.ops.devices import upload
from sps_runtime.runner.grammar_masks import NO_MASKS, Masks
from sps_runtime.runner.logit_edits import edit_row, has_edits
from sps_runtime.runner.philox import uniform
from sps_runtime.runner.truncation import truncate
from sps_runtime.types.plan import SampledToken, SamplePlan, StepPlan, TokenLogprobs
from sps_runtime.types.sampling import SamplingParams


def sample(
    logits_RV: Tensor,
    plan: StepPlan,
    sequences: Sequence[int],
    board_tokens: Mapping[int, int],
    masks: Masks = NO_MASKS,
) -> list[SampledToken]:
    """Sample one token for each of some sequences of a plan.

    Args:
        logits_RV: ``[len(sequences), vocab]`` in any floating dtype; left as it is.
        sequences: indices in `plan.sequences` whose `sample` is set.
        board_tokens: ids that this step read from the board, by sequence index.
        masks: what grammars allow, by sequence index. A sequence whose grammar allows nothing gets
            any token, and the reason.
    """
    planned = [plan.sequences[index] for index in sequences]
    if all(sequence.sample is not None and largest_is_all(sequence.sample) for sequence in planned):
        greedy = _largest(logits_RV)
        return [SampledToken(s.slot, token) for s, token in zip(planned, greedy, strict=True)]
    samples = [sequence.sample for sequence in planned if sequence.sample is not None]
    positions = [sequence.start + sequence.count for sequence in planned]
    known = [board_tokens.get(index) for index in sequences]
    found = [masks.get(index) for index in sequences]
    allowed = [None if isinstance(mask, GrammarError) else mask for mask in found]
    failures = [str(mask) if isinstance(mask, GrammarError) else None for mask in found]
    tokens_R = sample_rows(logits_RV, samples, positions, known, allowed)
    reports = _logprobs(logits_RV, samples, tokens_R)
    return [
        SampledToken(sequence.slot, token, reports.get(row), failures[row])
        for row, (sequence, token) in enumerate(zip(planned, tokens_R.tolist(), strict=True))
    ]


def sample_late(logits_RV: Tensor, plan: StepPlan) -> Tensor:
    """Token ids ``[rows]`` int64 of all sequences of a plan, on the logits' device, which is asked
    nothing; for sequences whose logits nothing edits."""
    samples = [sequence.sample for sequence in plan.sequences if sequence.sample is not None]
    positions = [sequence.start + sequence.count for sequence in plan.sequences]
    return sample_rows(logits_RV, samples, positions, [None] * len(samples))


def sample_rows(
    logits_RV: Tensor,
    samples: Sequence[SamplePlan],
    positions: Sequence[int],
    board_tokens: Sequence[int | None],
    allowed: Sequence[Allowed | None] = (),
) -> Tensor:
    """Token ids ``[rows]`` int64 at the given positions; arguments as in `sample`, one a row."""
    allowed = allowed or [None] * len(samples)
    edited = [
        row
        for row, sample_plan in enumerate(samples)
        if has_edits(sample_plan) or allowed[row] is not None
    ]
    logits_RV = logits_RV.to(torch.float32, copy=bool(edited))
    if edited:
        for row in edited:
            edit_row(logits_RV[row], samples[row], board_tokens[row], allowed[row])
    tokens_R = _argmax(logits_RV)
    drawn = [row for row, sample_plan in enumerate(samples) if not _greedy(sample_plan.params)]
    if drawn:
        params = [samples[row].params for row in drawn]
        rows = upload(np.array(drawn), logits_RV.device)
        tokens_R[rows] = _draw(logits_RV[rows], params, [positions[r] for r in drawn])
    return tokens_R


def token_logprobs(scores_V: Tensor, token: int, top: int, wanted: Sequence[int]) -> TokenLogprobs:
    """What to report of one position.

    Args:
        scores_V: log_softmax of the model's own logits, fp32: before penalties, biases, bans and
            temperature.
        top: how many of the most likely ids to name.
        wanted: further ids to name.
    """
    best = scores_V.topk(min(top, len(scores_V))) if top else None
    pairs = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    named = zip(wanted, scores_V[list(wanted)].tolist(), strict=True) if wanted else ()
    return TokenLogprobs(token, scores_V[token].item(), _best_first(pairs), _best_first(named))


def largest_is_all(sample_plan: SamplePlan) -> bool:
    """Whether the largest logit is all that is wanted."""
    return (
        _greedy(sample_plan.params) and sample_plan.logprobs is None and not has_edits(sample_plan)
    )


def _largest(logits_RV: Tensor) -> list[int]:
    """`_argmax` as ids. On a CPU straight from the memory: between two replays every call into
    torch finds cold caches."""
    if logits_RV.is_cpu and logits_RV.dtype == torch.float32:
        ids: list[int] = logits_RV.numpy().argmax(axis=-1).tolist()
        return ids
    return _argmax(logits_RV.to(torch.float32)).tolist()


def _argmax(logits_RV: Tensor) -> Tensor:
    """Each row's first largest. On CPU by NumPy, whose vectorised search is seven times torch's."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(dim=-1)
    return torch.from_numpy(logits_RV.numpy().argmax(axis=-1))


def _greedy(params: SamplingParams) -> bool:
    return params.greedy or params.top_k == 1


def _draw(logits_RV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    device = logits_RV.device
    temperature_R = upload(np.array([p.temperature for p in params], dtype=np.float32), device)
    probs_RV = truncate(logits_RV / temperature_R[:, None], params)
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    numbers = upload(uniform([p.seed for p in params], positions), device)
    target_R1 = numbers[:, None] * cumulative_RV[:, -1:]
    # right=True: the first id whose cumulative mass exceeds the target, so never one of mass 0.
    chosen_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    return chosen_R1[:, 0].clamp(max=logits_RV.shape[1] - 1)


def _logprobs(
    logits_RV: Tensor, samples: Sequence[SamplePlan], tokens_R: Tensor
) -> dict[int, TokenLogprobs]:
    rows = [row for row, sample_plan in enumerate(samples) if sample_plan.logprobs is not None]
    if not rows:
        return {}
    scores_RV = torch.log_softmax(logits_RV[rows].float(), dim=-1)
    return {
        row: token_logprobs(
            scores_V, int(tokens_R[row]), samples[row].logprobs or 0, samples[row].logprob_ids
        )
        for row, scores_V in zip(rows, scores_RV, strict=True)
    }


def _best_first(pairs: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))

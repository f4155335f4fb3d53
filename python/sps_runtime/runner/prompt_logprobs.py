"""Logprobs of prompt tokens, in chunks of rows so that memory stays bounded.

All logits of a long prompt at once would be gigabytes (8,192 rows x 152,000 ids x 4 bytes = 5 GB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.runner.input_batch import JudgedRows
from sps_runtime.runner.sampler import token_logprobs
from sps_runtime.types.plan import PromptLogprobs, SequencePlan, TokenLogprobs

LOGIT_BYTES = 64 << 20
"""fp32 logits of one chunk on one rank, at most (one row at least)."""

Logits = Callable[[Tensor, Sequence[int]], Tensor]
"""(my rows of this chunk, rows of each member) -> logits of my rows; crosses ranks."""


def judge_prompt(
    judged: JudgedRows, sequences: Sequence[SequencePlan], vocab: int, logits: Logits
) -> list[TokenLogprobs]:
    """One entry per judged row of this rank. A collective call where `logits` is one: the number of
    chunks follows from the member with most rows."""
    per_member = judged.per_member
    size = max(1, LOGIT_BYTES // (4 * vocab))
    values: list[TokenLogprobs] = []
    for begin in range(0, max(per_member), size):
        counts = [min(size, max(0, rows - begin)) for rows in per_member]
        scores = torch.log_softmax(logits(judged.rows[begin : begin + size], counts).float(), -1)
        for row, score_V in enumerate(scores[: len(judged.rows) - begin], begin):
            sequence = sequences[judged.sequences[row]]
            top, ids = sequence.prompt_top, sequence.prompt_ids
            values.append(token_logprobs(score_V, int(judged.targets[row]), top, ids))
    return values


def as_runs(
    judged: JudgedRows, values: Sequence[TokenLogprobs], sequences: Sequence[SequencePlan]
) -> tuple[PromptLogprobs, ...]:
    """The entries as runs of consecutive positions of one sequence."""
    if not values:
        return ()
    breaks = (np.diff(judged.sequences) != 0) | (np.diff(judged.positions) != 1)
    begins = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    return tuple(
        PromptLogprobs(
            slot=sequences[judged.sequences[begin]].slot,
            start=int(judged.positions[begin]),
            values=tuple(values[begin:end]),
        )
        for begin, end in zip(begins, [*begins[1:], len(values)], strict=True)
    )

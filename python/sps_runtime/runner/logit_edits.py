"""What changes a row of logits before anything is drawn from it: penalties, biases, bans."""

from __future__ import annotations

import torch
from torch import Tensor

from sps_runtime.grammar.matchers import without
from sps_runtime.grammar.protocol import Allowed
from sps_runtime.types.plan import SamplePlan


def has_edits(sample: SamplePlan) -> bool:
    """Whether `edit_row` would change anything."""
    params = sample.params
    return bool(params.penalized or params.logit_bias or params.grammar or sample.forbid_stop)


def edit_row(
    logit_V: Tensor,
    sample: SamplePlan,
    board_token: int | None,
    allowed: Allowed | None = None,
) -> None:
    """Change one row of fp32 logits in place.

    In this order: repetition penalty (Keskar et al. 2019: positive logits are divided, negative
    ones multiplied; over prompt and generated ids), frequency and presence penalties (OpenAI's,
    over generated ids), the bias, the ids that may not come now: a grammar's word is the last, so
    an id that it leaves alone comes although it is forbidden.

    Args:
        board_token: the sequence's newest id when the plan did not know it yet: a generated one,
            not in the plan's history.
        allowed: what the sequence's grammar allows, some id at least; None without a grammar.
    """
    params = sample.params
    if params.penalized:
        ids_H, count_H = _history(sample, board_token)
        ids_H, count_H = ids_H.to(logit_V.device), count_H.to(logit_V.device)
        seen_H = logit_V[ids_H]
        penalty = params.repetition_penalty
        seen_H = torch.where(seen_H > 0, seen_H / penalty, seen_H * penalty)
        seen_H -= params.frequency_penalty * count_H + params.presence_penalty * (count_H > 0)
        logit_V[ids_H] = seen_H
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logit_V.device)
        logit_V[ids] += torch.tensor(list(params.logit_bias.values()), device=logit_V.device)
    if allowed is not None:
        banned_V = torch.from_numpy(~without(allowed, sample.forbid_stop))
        logit_V.masked_fill_(banned_V.to(logit_V.device), -torch.inf)
    elif sample.forbid_stop:
        logit_V[torch.tensor(sample.forbid_stop, device=logit_V.device)] = -torch.inf


def _history(sample: SamplePlan, board_token: int | None) -> tuple[Tensor, Tensor]:
    """Distinct ids (int64) and how often each was generated (fp32)."""
    ids_H = _unpacked(sample.history_ids).long()
    count_H = _unpacked(sample.history_counts).float()
    if board_token is None:
        return ids_H, count_H
    known = ids_H == board_token
    if known.any():
        return ids_H, count_H + known
    return torch.cat((ids_H, ids_H.new_tensor([board_token]))), torch.cat(
        (count_H, count_H.new_ones(1))
    )


def _unpacked(packed: bytes) -> Tensor:
    if not packed:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(bytearray(packed), dtype=torch.int32)

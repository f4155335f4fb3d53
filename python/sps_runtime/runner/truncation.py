"""Truncation of distributions: top-k, top-p, min-p.

All three keep the ids whose probability reaches a threshold, so ids of equal probability are kept
or dropped together and what is kept depends on no order. As in transformers each applies to what
the one before left, renormalised: top-k, then top-p, then min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.ops.devices import upload
from sps_runtime.types.sampling import SamplingParams

FIRST_LOOK = 1024
"""Most likely ids that top-p sorts before it sorts all."""


def truncate(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """fp32 logits after temperature -> probabilities ``[rows, vocab]`` fp32 after truncation,
    0 for what was dropped. Each row's result depends on that row alone. Asks a device nothing."""
    vocab, device = logits_RV.shape[1], logits_RV.device
    top_k = [index for index, p in enumerate(params) if 0 < p.top_k < vocab]
    if top_k:
        counts, rows = [params[index].top_k for index in top_k], upload(np.array(top_k), device)
        logits_RV = _apply(logits_RV, rows, _top_k(logits_RV[rows], counts))
    probs_RV = torch.softmax(logits_RV, dim=-1)
    top_p = [index for index, p in enumerate(params) if p.top_p < 1]
    if top_p:
        masses = upload(np.array([params[i].top_p for i in top_p], dtype=np.float64), device)
        rows = upload(np.array(top_p), device)
        logits_RV = _apply(logits_RV, rows, _top_p(probs_RV[rows], masses))
    min_p = [index for index, p in enumerate(params) if p.min_p > 0]
    if min_p:
        ratio_R = upload(np.array([params[i].min_p for i in min_p], dtype=np.float32), device)
        rows = upload(np.array(min_p), device)
        chosen_RV = probs_RV[rows]
        keep = chosen_RV >= ratio_R[:, None] * chosen_RV.amax(dim=-1, keepdim=True)
        logits_RV = _apply(logits_RV, rows, keep)
    return torch.softmax(logits_RV, dim=-1) if top_p or min_p else probs_RV


def _apply(logits_RV: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    changed = logits_RV.clone()
    changed[rows] = changed[rows].masked_fill(~keep, -torch.inf)
    return changed


def _top_k(logits_RV: Tensor, counts: Sequence[int]) -> Tensor:
    """Keep each row's `counts` largest."""
    best_RK = logits_RV.topk(max(counts), dim=-1).values
    last = upload(np.array(counts, dtype=np.int64), logits_RV.device)[:, None] - 1
    return logits_RV >= best_RK.gather(1, last)


def _top_p(probs_RV: Tensor, masses_R: Tensor) -> Tensor:
    """Keep each row's smallest set of most likely ids with at least its mass (nucleus sampling,
    Holtzman et al. 2020). Whether the first look suffices is not asked of a device, which would
    have to be waited for: there everything is sorted."""
    vocab = probs_RV.shape[1]
    if probs_RV.device.type == "cpu":
        sorted_RK = probs_RV.topk(min(FIRST_LOOK, vocab), dim=-1).values
        if (sorted_RK.double().sum(-1) < masses_R).any() and vocab > FIRST_LOOK:
            sorted_RK = _descending(probs_RV)
    else:
        sorted_RK = _descending(probs_RV)
    before_RK = sorted_RK.cumsum(-1, dtype=torch.float64) - sorted_RK
    kept_R1 = (before_RK < masses_R[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return probs_RV >= sorted_RK.gather(1, kept_R1 - 1)


def _descending(values_RV: Tensor) -> Tensor:
    """Each row sorted. On CPU by NumPy, whose vectorised sort is three times torch's."""
    if values_RV.device.type != "cpu":
        return values_RV.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values_RV.numpy(), axis=-1)).flip(-1)

"""The mean-field tail: dropped pages are not forgotten, their means stand for them."""

from __future__ import annotations

import torch
from torch import Tensor

from sps_runtime.sparse.summaries import PageSummaries, part_counts

TAIL_NEEDS = {
    "none": frozenset[str](),
    "mean": frozenset({"mean_k_NKD", "mean_v_NKD"}),
    "variance": frozenset({"mean_k_NKD", "mean_v_NKD", "variance_NKD"}),
    "deviants": frozenset({"mean_k_NKD", "mean_v_NKD", "deviant_k_NKMD", "deviant_v_NKMD"}),
    "parts": frozenset({"parts_k_NKMD", "parts_v_NKMD"}),
}


def tail_partial(
    q_KGTD: Tensor, pages: PageSummaries, kept_KN: Tensor, kind: str = "mean"
) -> tuple[Tensor, Tensor]:
    """A partial attention over the pages that are not kept, each as a few tokens with a weight.

    With true dropped mass tau and tail mass tau' the merged output is within max(tau, tau') times
    the diameter of the values of the exact one: every value that the tail stands in with is a mean
    of true ones.

    Args:
        q_KGTD: fp32 ``[kv_heads, group, tokens, head_dim]``, scaled.
        kept_KN: bool ``[kv_heads, pages]``; where False the tail speaks.
        kind: ``mean`` (n exp(q.mean) mean value), ``variance`` (with exp(1/2 q^2.var)),
            ``deviants`` (those themselves and the mean of the others), ``parts`` (means of runs).

    Returns:
        o ``[kv_heads, group, tokens, head_dim]`` and lse ``[kv_heads, group, tokens]``, fp32.
    """
    k_NKMD, v_NKMD, log_count_NKM = _stand_ins(q_KGTD, pages, kind)
    score = torch.einsum("kgtd,nkmd->kgtnm", q_KGTD, k_NKMD)
    score = score + log_count_NKM.transpose(0, 1)[:, None, None]
    if kind == "variance":
        variance = pages.get("variance_NKD")
        score = score + 0.5 * torch.einsum("kgtd,nkd->kgtn", q_KGTD.square(), variance)[..., None]
    score = score.masked_fill(kept_KN[:, None, None, :, None], -torch.inf)
    lse = score.flatten(3).logsumexp(-1)
    weight = torch.exp(score - lse.masked_fill(lse.isneginf(), 0.0)[..., None, None])
    return torch.einsum("kgtnm,nkmd->kgtd", weight, v_NKMD), lse


def _stand_ins(q_KGTD: Tensor, pages: PageSummaries, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[pages, kv_heads, m, head_dim]`` and log counts ``[pages, kv_heads, m]``
    of the few tokens that stand for a page."""
    counts = pages.counts_N
    heads = q_KGTD.shape[0]
    if kind == "parts":
        k, v = pages.get("parts_k_NKMD"), pages.get("parts_v_NKMD")
        run = part_counts(counts, int(counts.max()), k.shape[2])
        return k, v, run.log()[:, None].expand(-1, heads, -1)
    k, v = pages.get("mean_k_NKD"), pages.get("mean_v_NKD")
    if kind != "deviants":
        return k[:, :, None], v[:, :, None], counts.log()[:, None, None].expand(-1, heads, 1)
    dk, dv = pages.get("deviant_k_NKMD"), pages.get("deviant_v_NKMD")
    others = (counts - dk.shape[2])[:, None, None]
    divisor = others.clamp_min(1)
    rest_k = (k * counts[:, None, None] - dk.sum(2)) / divisor
    rest_v = (v * counts[:, None, None] - dv.sum(2)) / divisor
    log_rest = others.clamp_min(0).log().expand(-1, heads, 1)
    log_count = torch.cat((log_rest, torch.zeros(*dk.shape[:3])), dim=2)
    return (
        torch.cat((rest_k[:, :, None], dk), 2),
        torch.cat((rest_v[:, :, None], dv), 2),
        log_count,
    )

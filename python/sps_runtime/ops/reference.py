"""The truth that every other implementation is tested against: fp32 (or fp64), plain torch, slow.

Only what needs no cleverness to be seen right: one softmax over all keys, one mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal grouped-query attention.

    Args:
        q_THD: ``[tokens, heads, head_dim]``; head h reads KV head ``h // (heads / kv_heads)``.
        k_SKD, v_SKD: ``[keys, kv_heads, head_dim]``.
        q_positions_T, k_positions_S: absolute positions; a key is seen where
            ``q - window < k <= q``.

    Returns:
        o ``[tokens, heads, head_dim]`` and lse ``[tokens, heads]`` (natural log), fp32, or fp64
        where q is fp64. A query that sees no key has o = 0 and lse = -inf.
    """
    dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    group = q_THD.shape[1] // max(k_SKD.shape[1], 1)
    q, k, v = q_THD.to(dtype), k_SKD.to(dtype), v_SKD.to(dtype)
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q, k) * scale
    distance_TS = q_positions_T[:, None] - k_positions_S[None, :]
    hidden_TS = distance_TS < 0
    if window is not None:
        hidden_TS |= distance_TS >= window
    scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    lse_HT = torch.logsumexp(scores_HTS, dim=-1)
    finite_HT = lse_HT.masked_fill(lse_HT.isneginf(), 0.0)
    weights_HTS = torch.exp(scores_HTS - finite_HT[..., None])
    o_THD = torch.einsum("hts,shd->thd", weights_HTS, v)
    return o_THD, lse_HT.transpose(0, 1).contiguous()


def gather_pages(
    pools: Sequence[Tensor], slots_per_rank: int, page_ids: Tensor, tokens: int
) -> Tensor:
    """The first `tokens` tokens of pages laid end to end.

    Args:
        pools: ``[slots, kv_heads, page_size, head_dim]`` per rank.
        page_ids: ``[n]``, rank * slots_per_rank + slot each.

    Returns:
        ``[tokens, kv_heads, head_dim]``.
    """
    pages = [pools[i // slots_per_rank][i % slots_per_rank] for i in page_ids.tolist()]
    if not pages:
        _, heads, _, dim = pools[0].shape
        return pools[0].new_zeros((0, heads, dim))
    return torch.cat(pages, dim=1)[:, :tokens].transpose(0, 1)


def merge(o_SnTHD: Tensor, lse_SnTH: Tensor) -> tuple[Tensor, Tensor]:
    """n partials over disjoint keys, stacked in dim 0, as one; fp64 inside."""
    lse = torch.logsumexp(lse_SnTH.double(), dim=0)
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    weights = torch.exp(lse_SnTH.double() - finite)
    return (o_SnTHD.double() * weights[..., None]).sum(0), lse

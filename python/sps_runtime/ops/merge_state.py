"""Merging partial attentions over disjoint keys.

A partial is ``(o, lse)``: the softmax-weighted mean of the values of some keys, and the natural log
of the sum of the exponentials of their scores. Two of them make the partial of the union
(FlashAttention's rescaling, FlashInfer's `merge_state`, flash-decoding's reduction):

    m = max(lse_a, lse_b)
    o = (o_a exp(lse_a - m) + o_b exp(lse_b - m)) / (exp(lse_a - m) + exp(lse_b - m))
    lse = m + ln(exp(lse_a - m) + exp(lse_b - m))

It is associative and commutative up to rounding. Everything is fp32, whatever the dtype of what
came over the wire: in bf16 an lse of 10 has a step of 0.06, six per cent of a weight. A partial
that saw no key has lse = -inf and o = 0; it changes nothing, and two of them make another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_state(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """The partial of queries that saw no key: fp32 zeros, and -inf."""
    o_THD = q_THD.new_zeros(q_THD.shape, dtype=torch.float32)
    return o_THD, q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32)


def unwritten_state(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the partial of queries all of which will be written."""
    o_THD = q_THD.new_empty(q_THD.shape, dtype=torch.float32)
    return o_THD, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partials.

    Args:
        o_a, o_b: ``[tokens, heads, head_dim]``, any float dtype.
        lse_a, lse_b: ``[tokens, heads]`` fp32, natural log; -inf where no key was seen.

    Returns:
        (o, lse), fp32, shaped like the arguments. o is 0 where lse is -inf.

    Example:
        >>> one, lse = torch.ones(1, 1, 2), torch.zeros(1, 1)
        >>> merge_state(one, lse, 3 * one, lse)[0]
        tensor([[[2., 2.]]])
    """
    weight_a, weight_b, lse = _weights(lse_a, lse_b)
    o = o_a.float() * weight_a[..., None]
    return o.add_(o_b.float() * weight_b[..., None]), lse


def merge_states(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge any number of partials, at least one, in their order; arguments as `merge_state`."""
    o, lse = partials[0][0].float().clone(), partials[0][1].clone()
    for o_b, lse_b in partials[1:]:
        merge_rows_(o, lse, None, o_b, lse_b)
    return o, lse


def merge_rows_(o: Tensor, lse: Tensor, rows: Tensor | None, o_b: Tensor, lse_b: Tensor) -> None:
    """Merge a partial of some rows into an accumulator, in place.

    Args:
        o, lse: fp32 ``[tokens, heads, head_dim]`` and ``[tokens, heads]``, changed in place.
        rows: int64 ``[n]`` distinct rows that the partial is of; None for all.
        o_b, lse_b: ``[n, heads, head_dim]`` in any float dtype and ``[n, heads]`` fp32.
    """
    if rows is None:
        weight_a, weight_b, merged = _weights(lse, lse_b)
        o.mul_(weight_a[..., None]).add_(o_b.float() * weight_b[..., None])
        lse.copy_(merged)
        return
    merged_o, merged = merge_state(o[rows], lse[rows], o_b, lse_b)
    o[rows] = merged_o
    lse[rows] = merged


def _weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = torch.maximum(lse_a, lse_b)
    # Where both are -inf, -inf - -inf would be NaN: measured from 0 both weights are exp(-inf) = 0.
    base = largest.masked_fill(largest.isneginf(), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    divisor = total.masked_fill(total == 0.0, 1.0)
    return weight_a / divisor, weight_b / divisor, base + torch.log(total)

"""Merging partials that FlashInfer computed, or will merge: their log-sum-exp is to base 2."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.ops.merge_state import merge_rows_

LN2 = math.log(2.0)
_NOTHING = -5e4
"""FlashInfer 0.6's log2 of no mass; its merge makes NaN of two -inf."""


_MOST_OUTPUTS = 8192
"""Heads times dim: its merges give a row to one block, eight outputs to a thread of 1,024."""


def merges(o: Tensor) -> bool:
    """Whether FlashInfer's kernels merge such outputs ``[tokens, heads, dim]``."""
    return o.dtype != torch.float32 and o.shape[1] * o.shape[2] <= _MOST_OUTPUTS


def base2(partial: Partial) -> tuple[Tensor, Tensor]:
    """A partial as FlashInfer's merges take it."""
    return partial.o.contiguous(), (partial.lse / LN2).clamp_min(_NOTHING)


def merge_shared_(
    library: ModuleType,
    o: Tensor,
    lse: Tensor,
    shared: tuple[Tensor, Tensor],
    back: Tensor,
    has: Tensor,
) -> None:
    """Merge what a shared call computed into all rows, in place and without asking the device.

    Args:
        o, lse: ``[rows, heads, dim]`` and ``[rows, heads]`` fp32 to base 2, every row with a key.
        shared: likewise, ``[places, ...]``.
        back, has: ``[rows]`` int64 and bool, as `shared.places` has them.
    """
    o_b, lse_b = shared[0][back], shared[1][back]
    if merges(o):
        library.merge_state_in_place(o, lse, o_b, lse_b, has)
        return
    exact, natural = o.float(), lse.mul(LN2)  # `exact` is o itself where that is fp32
    merge_rows_(exact, natural, None, o_b, lse_b.mul(LN2).masked_fill(~has[:, None], -torch.inf))
    o.copy_(exact)
    lse.copy_(natural.div_(LN2))

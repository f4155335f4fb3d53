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
        back, has: ``[rows]`` int64 and bool, as `flashinfer_shared.places` has them.
    """
    o_b, lse_b = shared[0][back], shared[1][back]
    if o.dtype != torch.float32:
        library.merge_state_in_place(o, lse, o_b, lse_b, has)
        return
    natural = lse.mul(LN2)
    merge_rows_(o, natural, None, o_b, lse_b.mul(LN2).masked_fill(~has[:, None], -torch.inf))
    lse.copy_(natural.div_(LN2))

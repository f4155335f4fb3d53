"""A step of sequences whose attention differs: stride attention for some, another for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sequence_parallel.stride import Stride
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.types.attention import SparseCounters, SparseSettings
from sps_runtime.types.plan import StepPlan

Attention = Callable[..., Tensor]


def strided_sequences(layout: ShardLayout) -> dict[SparseSettings, list[int]]:
    """Which sequences of a step are prefilled by stride attention, by their settings."""
    found: dict[SparseSettings, list[int]] = {}
    for index, settings in enumerate(layout.sparse):
        if settings is not None and settings.estimator == "stride":
            found.setdefault(settings, []).append(index)
    return found


def with_stride(
    plan: StepPlan,
    layout: ShardLayout,
    context: AttentionContext,
    strided: Mapping[SparseSettings, Sequence[int]],
    rest: Callable[[StepPlan, ShardLayout], Attention],
) -> Attention:
    """The attention of a step some of whose sequences are `strided`.

    Args:
        rest: the attention of a plan and its layout, for the other sequences.
    """
    known = {index for indices in strided.values() for index in indices}
    others = [index for index in range(len(plan.sequences)) if index not in known]
    if not others and len(strided) == 1:
        return Stride(StepState(layout, context), next(iter(strided)))
    member = layout.member(context.mesh.sp_rank)
    strides = []
    for settings, indices in strided.items():
        part = _part(plan, layout, context, indices)[1]
        stride = Stride(StepState(part, context), settings)
        strides.append((stride, _rows(layout, member, indices)))
    left = rest(*_part(plan, layout, context, others)) if others else None
    return Mixed(strides, left, _rows(layout, member, others))


class Mixed:
    """`layers.step.SequenceAttention` of one step, its rows divided.

    The rest goes first, for it may publish: by then everything must be written.
    """

    def __init__(
        self, strides: Sequence[tuple[Stride, Tensor]], rest: Attention | None, rows: Tensor
    ) -> None:
        self._strides, self._rest, self._rows = strides, rest, rows

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        out = torch.empty_like(q_THD)
        for stride, rows in self._strides:
            stride.write(layer, k_TKD[rows], v_TKD[rows])
        if self._rest is not None:
            q, k, v = (x[self._rows] for x in (q_THD, k_TKD, v_TKD))
            out[self._rows] = self._rest(layer, q, k, v, scale=scale, window=window)
        self._strides[0][0].publish(layer)
        for stride, rows in self._strides:
            kv_heads = k_TKD.shape[1]
            out[rows] = stride.attend(layer, q_THD[rows], kv_heads, scale=scale, window=window)
        return out

    def counters(self) -> tuple[SparseCounters, ...]:
        """Those of all sequences that do not read all their pages."""
        found = [counted for stride, _ in self._strides for counted in stride.counters()]
        asked = getattr(self._rest, "counters", None)
        return (*found, *(asked() if asked is not None else ()))


def _part(
    plan: StepPlan, layout: ShardLayout, context: AttentionContext, indices: Sequence[int]
) -> tuple[StepPlan, ShardLayout]:
    some = msgspec.structs.replace(plan, sequences=tuple(plan.sequences[i] for i in indices))
    slots = context.store.shape.slots
    return some, ShardLayout(some, page_size=layout.page_size, pages_per_rank=slots)


def _rows(layout: ShardLayout, member: int, indices: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(np.isin(layout.sequences(member), indices)))

"""A step of sequences whose attention differs: special ones for some, another for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.sequence_parallel.csa.decode import SparseDecode
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sequence_parallel.stride.prefill import Stride
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.types.attention import SparseCounters, SparseSettings
from sps_runtime.types.plan import StepPlan

Attention = Callable[..., Tensor]


class Part(Protocol):
    """Attention of some of a step's sequences, whose calls come apart so that all may write before
    any reads: `write`, then `publish`, then `attend`."""

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None: ...

    def publish(self, layer: int) -> None: ...

    def attend(
        self, layer: int, q_THD: Tensor, kv_heads: int, *, scale: float, window: int | None
    ) -> Tensor: ...

    def counters(self) -> tuple[SparseCounters, ...]: ...


Make = Callable[[StepState], Part]


def special_parts(layout: ShardLayout) -> list[tuple[Make, list[int]]]:
    """What attends to which sequences of a step, of those that no strategy knows: prompts by stride
    attention, and generated tokens that choose their pages; by their settings."""
    found: dict[tuple[type[Stride] | type[SparseDecode], SparseSettings], list[int]] = {}
    for index, (prefill, decode) in enumerate(
        zip(layout.sparse, layout.sparse_decode, strict=True)
    ):
        if prefill is not None and prefill.estimator == "stride":
            found.setdefault((Stride, prefill), []).append(index)
        elif decode is not None:
            found.setdefault((SparseDecode, decode), []).append(index)
    return [(partial(kind, settings=settings), at) for (kind, settings), at in found.items()]


def divided(
    plan: StepPlan,
    layout: ShardLayout,
    context: AttentionContext,
    special: Sequence[tuple[Make, Sequence[int]]],
    rest: Callable[[StepPlan, ShardLayout], Attention],
) -> Attention:
    """The attention of a step some of whose sequences are special.

    Args:
        special: from `special_parts`; at least one.
        rest: the attention of a plan and its layout, for the other sequences.
    """
    known = {index for _, indices in special for index in indices}
    others = [index for index in range(len(plan.sequences)) if index not in known]
    if not others and len(special) == 1:
        whole = special[0][0](StepState(layout, context))
        return Mixed([(whole, None)], None, None)
    member = layout.member(context.mesh.sp_rank)
    parts: list[tuple[Part, Tensor | None]] = []
    for make, indices in special:
        part = _part(plan, layout, context, indices)[1]
        parts.append((make(StepState(part, context)), _rows(layout, member, indices)))
    left = rest(*_part(plan, layout, context, others)) if others else None
    return Mixed(parts, left, _rows(layout, member, others))


class Mixed:
    """`layers.step.SequenceAttention` of one step, its rows divided.

    The rest goes first, for it may publish: by then everything must be written.

    Args:
        parts: each with its rows; None for all of them.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Part, Tensor | None]],
        rest: Attention | None,
        rows: Tensor | None,
    ) -> None:
        self._parts, self._rest, self._rows = parts, rest, rows

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
        out, kv_heads = torch.empty_like(q_THD), k_TKD.shape[1]
        for part, rows in self._parts:
            part.write(layer, _take(k_TKD, rows), _take(v_TKD, rows))
        if self._rest is not None:
            q, k, v = (_take(x, self._rows) for x in (q_THD, k_TKD, v_TKD))
            out[self._rows] = self._rest(layer, q, k, v, scale=scale, window=window)
        self._parts[0][0].publish(layer)
        for part, rows in self._parts:
            o = part.attend(layer, _take(q_THD, rows), kv_heads, scale=scale, window=window)
            if rows is None:
                return o
            out[rows] = o
        return out

    def counters(self) -> tuple[SparseCounters, ...]:
        """Those of all sequences that do not read all their pages."""
        found = [counted for part, _ in self._parts for counted in part.counters()]
        asked = getattr(self._rest, "counters", None)
        return (*found, *(asked() if asked is not None else ()))


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _part(
    plan: StepPlan, layout: ShardLayout, context: AttentionContext, indices: Sequence[int]
) -> tuple[StepPlan, ShardLayout]:
    some = msgspec.structs.replace(plan, sequences=tuple(plan.sequences[i] for i in indices))
    slots = context.store.shape.slots
    return some, ShardLayout(some, page_size=layout.page_size, pages_per_rank=slots)


def _rows(layout: ShardLayout, member: int, indices: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(np.isin(layout.sequences(member), indices)))

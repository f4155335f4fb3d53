"""Stride attention as CSPS published it: near tokens dense, far ones one in s, by an all-to-all.

Level 0 is dense among the tokens of a rank. At a level above it head h keeps the tokens t with
``t = h (mod s)`` of queries, keys and values alike, so that every token is kept by some heads; what
is kept crosses by Ulysses' all-to-all inside the level's group, is attended to there, and outputs
come back with their log-sum-exp. With grouped queries the phase is that of the KV head, so that K
and V travel once. A level sees only tokens that lower ones do not: none is counted twice, s = 1 is
exact attention, and so is a group of one.

Messages are ordered as the authors' code orders them, K -> first queries -> V -> other queries, and
outputs return by parts of queries; everything is begun before this rank's own tokens are attended
to, so that between hosts it crosses meanwhile. (Their code waits for each message, exponentiates
without subtracting the maximum, and counts a rank's own tokens at every level.) Ours multiplies
scores with values in one kernel, so the first queries wait for V as well.

Bytes per layer and rank for a fresh prompt and one level, beside 4 bytes for each log-sum-exp:
``(L/P)(2 Hq + 2 max(Hkv, P)) d b (P - 1)/(P s)``. Layers with a sliding window run exact, as
pass-KV.
"""

from __future__ import annotations

import itertools

import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import QueryRun
from sps_runtime.attention.page_reads import cut_pieces, query_runs
from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare, KVReads
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sequence_parallel.stride.counts import StrideCounts
from sps_runtime.attention.sequence_parallel.stride.level import PARTS, TAGS, LevelExchange
from sps_runtime.attention.strided_layout import levels_of
from sps_runtime.types.attention import SparseCounters, SparseSettings


class Stride:
    """`layers.step.SequenceAttention` of one step whose sequences all have these settings.

    Raises:
        ValueError: pages do not divide by a stride.
    """

    def __init__(self, step: StepState, settings: SparseSettings) -> None:
        self._step = step
        self._plans = levels_of(settings, step.size)
        self._counts = StrideCounts(step, self._plans)
        self._levels: list[LevelExchange] | None = None
        self._windowed: dict[int, KVReads] = {}
        self._local = self._local_runs()

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
        self.write(layer, k_TKD, v_TKD)
        self.publish(layer)
        return self.attend(layer, q_THD, k_TKD.shape[1], scale=scale, window=window)

    def counters(self) -> tuple[SparseCounters, ...]:
        """What each sequence read and sent so far; layers with a window are not in it."""
        return self._counts.of_sequences()

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """The first half of a call, where others share the step."""
        self._step.write(layer, k_TKD, v_TKD)

    def publish(self, layer: int) -> None:
        """What is written can be read by members of this host."""
        self._step.publish(layer)

    def attend(
        self, layer: int, q_THD: Tensor, kv_heads: int, *, scale: float, window: int | None
    ) -> Tensor:
        """Attention once the step's KV of this layer is written and published."""
        if window is not None:
            return self._exact(layer, q_THD, kv_heads, scale, window)
        if self._levels is None:
            self._levels = [
                LevelExchange(self._step, plan, q_THD.shape[1], kv_heads, 1 + index * TAGS)
                for index, plan in enumerate(self._plans)
            ]
        step, levels = self._step, self._levels
        before = step.context.traffic.attention_bytes
        begun = [level.begin(layer, q_THD) for level in levels]
        pool, traffic = step.context.pages(layer), step.context.traffic
        own = step.context.backend.partial(q_THD, self._local, pool, scale=scale)
        for exchange, part in itertools.product(begun, range(PARTS)):
            traffic.exposed_s += exchange.compute(part, scale)
        for exchange, part in itertools.product(begun, range(PARTS)):
            traffic.exposed_s += exchange.merge(part, own)
        self._counts.add(traffic.attention_bytes - before)
        return own.o.to(q_THD.dtype)

    def _exact(self, layer: int, q_THD: Tensor, kv_heads: int, scale: float, window: int) -> Tensor:
        step, heads = self._step, q_THD.shape[1]
        reads = self._windowed.get(window)
        if reads is None:
            readers = [step.layout.runs(member) for member in range(step.size)]
            reads = self._windowed[window] = KVReads(step, readers, window)
        shares = [HeadShare.of(0, heads, heads // kv_heads)] * step.size
        return reads.attend(layer, q_THD, shares, scale=scale, window=window).o.to(q_THD.dtype)

    def _local_runs(self) -> list[QueryRun]:
        step, layout = self._step, self._step.layout
        own = np.flatnonzero(layout.pages.owners == step.context.mesh.sp_rank)
        return query_runs(layout, cut_pieces(layout, layout.runs(step.me), own, None), own)

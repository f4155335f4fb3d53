"""One level of stride attention on one rank: what is sent, computed and merged in each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial, QueryRun
from sps_runtime.attention.page_reads import Mask
from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare
from sps_runtime.attention.sequence_parallel.exact.partials import pack, packed_bytes, unpack
from sps_runtime.attention.sequence_parallel.exact.ulysses import head_shares
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sequence_parallel.stride.keys import (
    Segment,
    StridedKeys,
    unit_pool,
    unreachable,
)
from sps_runtime.attention.strided_layout import OUTSIDE, Level, StridedLayout
from sps_runtime.distributed.communicator import Pending
from sps_runtime.ops.merge_state import merge_rows_

PARTS = 2
"""Queries travel, are attended to, and return in so many parts."""
TAGS = 2 + 2 * PARTS

Started = tuple[Pending, list[Tensor]]
Spans = Sequence[tuple[int, int]]
"""Rows (begin, end) of each member of the step's group."""


@dataclass(frozen=True)
class _Part:
    """A part of the queries, by (member and) phase.

    Attributes:
        mine: this rank's rows.
        counts: rows of each member.
        runs: all members' rows, in the order of members.
    """

    mine: dict[int, Tensor]
    counts: dict[tuple[int, int], int]
    runs: dict[int, list[QueryRun]]


class LevelExchange:
    """A level over the layers of one step.

    Args:
        heads, kv_heads: of this rank's TP slice.
        tag: first of `TAGS` tags of its messages, which are not waited for in the order in which
            they were begun.
        cuts: rows that each part of the queries has; None for equal parts. Queries that are given
            with `cuts` are those of the part alone.

    Raises:
        ValueError: a page outside of the group cannot be read from here, or pages do not divide by
            the level's stride.
    """

    def __init__(
        self,
        step: StepState,
        level: Level,
        heads: int,
        kv_heads: int,
        tag: int = 0,
        cuts: Sequence[Spans] | None = None,
    ) -> None:
        self._step, self._tag = step, tag
        layout = self._layout = StridedLayout(step.layout, level, step.me)
        self._members = layout.members
        first_head, group = step.context.mesh.tp_rank * kv_heads, heads // kv_heads
        shares = head_shares(heads, kv_heads, len(self._members))
        self._segments = {
            member: _cut(share, group, first_head, level.stride)
            for member, share in zip(self._members, shares, strict=True)
        }
        sources = (*self._members, OUTSIDE) if level.top else tuple(self._members)
        if level.top and unreachable(step, layout):
            raise ValueError(f"epoch {step.layout.epoch} reads pages that this rank cannot reach")
        self._sources = sources
        if cuts is None:
            self._keys = self.keys(None)
            self._parts = [self._equal_part(part) for part in range(PARTS)]
        else:
            self._parts = [self._cut_part(spans) for spans in cuts]

    def keys(self, pages: Mask | None) -> StridedKeys:
        """The kept keys of some pages of the step's table; None for all."""
        return StridedKeys(self._step, self._layout, self._segments, self._sources, pages)

    def begin(self, layer: int, q_THD: Tensor) -> LayerExchange:
        """Begin to send K, the first queries, V, the other queries of a layer. All members of the
        step's group call it, and then the steps of what it returns, in the same order."""
        own = self._step.context.store.own
        keys = self._keys.start(own.k[layer], self._tag)
        queries = [self._start_queries(q_THD, 0)]
        values = self._keys.start(own.v[layer], self._tag + 1)
        queries += [self._start_queries(q_THD, part) for part in range(1, PARTS)]
        return LayerExchange(self, layer, q_THD, (keys, values), queries)

    def gather(
        self, layer: int, started: tuple[Started | None, Started | None]
    ) -> tuple[Tensor, Tensor]:
        """K and V by segment, once they are here."""
        keys, values = (self._keys.gather(layer, side, started[side]) for side in (0, 1))
        return keys, values

    def attend(
        self,
        part: int,
        q_THD: Tensor,
        arrived: Sequence[Tensor],
        kv: tuple[Tensor, Tensor],
        scale: float,
    ) -> list[Partial]:
        """A part's partials of all members' queries, by this rank's segments."""
        step, of = self._step, self._parts[part]
        dim, mine = q_THD.shape[2], self._segments[self._step.me]
        by_member = []
        for member in self._members:
            if member == step.me:
                by_member.append([_rows(q_THD, of.mine, segment) for segment in mine])
                continue
            shapes = [(of.counts[member, s.phase], s.heads, dim) for s in mine]
            sizes = [rows * heads * dim for rows, heads, dim in shapes]
            pieces = torch.split(arrived[member], sizes)
            by_member.append([p.view(shape) for p, shape in zip(pieces, shapes, strict=True)])
        return [
            step.context.backend.partial(
                torch.cat([pieces[index] for pieces in by_member]),
                of.runs[segment.phase],
                unit_pool(*kv, index),
                scale=scale,
            )
            for index, segment in enumerate(mine)
        ]

    def start_outputs(self, part: int, found: Sequence[Partial], like: Tensor) -> Started:
        """Begin to return a part's partials; the other members' are this rank's rows."""
        send, recv = self.outputs(part, found, like.dtype), self.output_rooms(part, like)
        return self._step.start(send, recv, self._tag + 2 + PARTS + part), recv

    def outputs(self, part: int, found: Sequence[Partial], dtype: torch.dtype) -> list[Tensor]:
        """A part's partials for each other member, packed."""
        of, send = self._parts[part], self._nothing(torch.empty(0, dtype=torch.uint8))
        for member in self._others():
            packed = [
                pack(*_of_member(partial, of, self._members, member, segment.phase), dtype)
                for segment, partial in zip(self._segments[self._step.me], found, strict=True)
            ]
            send[member] = torch.cat(packed) if packed else send[member]
        return send

    def output_rooms(self, part: int, like: Tensor) -> list[Tensor]:
        """Where a part's partials of this rank's rows arrive; `like` has rows' dim and dtype."""
        of, recv = self._parts[part], self._nothing(like.new_empty(0, dtype=torch.uint8))
        for member in self._others():
            sizes = self._sizes(member, of, like.shape[2], like.dtype)
            recv[member] = recv[member].new_empty(sum(sizes))
        return recv

    def merge(
        self, part: int, found: Sequence[Partial], arrived: Sequence[Tensor], into: Partial,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Merge what a part's queries of this rank found into its partial of all rows."""
        step, of = self._step, self._parts[part]
        dim = into.o.shape[2]
        for member in self._members:
            cut = self._segments[member]
            if member == step.me:
                others = [
                    _of_member(partial, of, self._members, member, segment.phase)
                    for segment, partial in zip(cut, found, strict=True)
                ]
            else:
                messages = torch.split(arrived[member], self._sizes(member, of, dim, dtype))
                others = [
                    _fields(unpack(m, of.counts[step.me, s.phase], s.heads, dim, dtype))
                    for m, s in zip(messages, cut, strict=True)
                ]
            for segment, (o, lse) in zip(cut, others, strict=True):
                heads = slice(segment.begin, segment.end)
                rows = of.mine[segment.phase]
                merge_rows_(into.o[:, heads], into.lse[:, heads], rows, o, lse)

    def queries(self, part: int, q_THD: Tensor) -> list[Tensor]:
        """A part's queries of this rank for each other member."""
        of, send = self._parts[part], self._nothing(q_THD.new_empty(0))
        for member in self._others():
            rows = [_rows(q_THD, of.mine, s).flatten() for s in self._segments[member]]
            send[member] = torch.cat(rows) if rows else send[member]
        return send

    def query_rooms(self, part: int, like: Tensor) -> list[Tensor]:
        """Where a part's queries of the other members arrive."""
        of, recv = self._parts[part], self._nothing(like.new_empty(0))
        here = self._segments[self._step.me]
        for member in self._others():
            rows = sum(of.counts[member, s.phase] * s.heads for s in here)
            recv[member] = like.new_empty(rows * like.shape[2])
        return recv

    def _start_queries(self, q_THD: Tensor, part: int) -> Started:
        recv = self.query_rooms(part, q_THD)
        return self._step.start(self.queries(part, q_THD), recv, self._tag + 2 + part), recv

    def _sizes(self, member: int, of: _Part, dim: int, dtype: torch.dtype) -> list[int]:
        """Bytes of what a member returns to this rank, by its segments."""
        me = self._step.me
        return [
            packed_bytes(of.counts[me, segment.phase], segment.heads, dim, dtype)
            for segment in self._segments[member]
        ]

    def _nothing(self, nothing: Tensor) -> list[Tensor]:
        return [nothing] * self._step.size

    def _others(self) -> list[int]:
        return [member for member in self._members if member != self._step.me]

    def _equal_part(self, part: int) -> _Part:
        """One of `PARTS`, by the rows that travel."""

        def rows_of(member: int, phase: int) -> tuple[int, int]:
            count = len(self._layout.rows(member, phase))
            return count * part // PARTS, count * (part + 1) // PARTS

        return self._part(rows_of, 0)

    def _cut_part(self, spans: Spans) -> _Part:
        """The part of some rows of each member."""

        def rows_of(member: int, phase: int) -> tuple[int, int]:
            begin, end = np.searchsorted(self._layout.rows(member, phase), spans[member])
            return int(begin), int(end)

        return self._part(rows_of, spans[self._step.me][0])

    def _part(self, rows_of: Callable[[int, int], tuple[int, int]], first_row: int) -> _Part:
        layout, me = self._layout, self._step.me
        phases = {segment.phase for cut in self._segments.values() for segment in cut}
        counts: dict[tuple[int, int], int] = {}
        mine, runs = {}, {}
        for phase in phases:
            spans = [(member, *rows_of(member, phase)) for member in self._members]
            counts |= {(member, phase): end - begin for member, begin, end in spans}
            begin, end = rows_of(me, phase)
            mine[phase] = torch.from_numpy(layout.rows(me, phase)[begin:end] - first_row)
            runs[phase] = layout.query_runs(spans, phase)
        return _Part(mine, counts, runs)


class LayerExchange:
    """A level in one layer, begun. `compute` and `merge` are called once a part, in order."""

    def __init__(
        self,
        level: LevelExchange,
        layer: int,
        q_THD: Tensor,
        keys: tuple[Started | None, Started | None],
        queries: list[Started],
    ) -> None:
        self._level, self._layer, self._q = level, layer, q_THD
        self._keys, self._queries = keys, queries
        self._kv: tuple[Tensor, Tensor] | None = None
        self._found: list[list[Partial]] = []
        self._returned: list[Started] = []

    def compute(self, part: int, scale: float) -> float:
        """Attend with all members' queries of a part, and begin to return what they found; the
        seconds waited."""
        if self._kv is None:
            self._kv = self._level.gather(self._layer, self._keys)
        pending, arrived = self._queries[part]
        waited = pending.wait()
        found = self._level.attend(part, self._q, arrived, self._kv, scale)
        self._found.append(found)
        self._returned.append(self._level.start_outputs(part, found, self._q))
        return waited

    def merge(self, part: int, into: Partial) -> float:
        """Merge a part's outputs into this rank's own partial; the seconds waited."""
        pending, arrived = self._returned[part]
        waited = pending.wait()
        self._level.merge(part, self._found[part], arrived, into, self._q.dtype)
        return waited


def _cut(share: HeadShare, group: int, first_head: int, stride: int) -> list[Segment]:
    """A share by KV heads; the phase is that of the whole model's KV head."""
    return [
        Segment(kv, max(share.q[0], kv * group), min(share.q[1], (kv + 1) * group), phase)
        for kv in range(*share.kv)
        for phase in ((first_head + kv) % stride,)
    ]


def _rows(q_THD: Tensor, rows: dict[int, Tensor], segment: Segment) -> Tensor:
    return q_THD[:, segment.begin : segment.end].index_select(0, rows[segment.phase])


def _of_member(
    partial: Partial, of: _Part, members: Sequence[int], member: int, phase: int
) -> tuple[Tensor, Tensor]:
    """One member's rows of a partial of all members'."""
    begin = sum(of.counts[other, phase] for other in members if other < member)
    rows = slice(begin, begin + of.counts[member, phase])
    return partial.o[rows], partial.lse[rows]


def _fields(partial: Partial) -> tuple[Tensor, Tensor]:
    return partial.o, partial.lse

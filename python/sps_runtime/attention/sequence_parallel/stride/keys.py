"""Kept keys and values of one level of stride attention: sent or read in place, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import PagePool
from sps_runtime.attention.page_reads import Mask
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.strided_layout import OUTSIDE, StridedLayout
from sps_runtime.distributed.communicator import Pending


@dataclass(frozen=True)
class Segment:
    """Query heads [begin, end) of one KV head, which one member attends with, and their phase."""

    kv_head: int
    begin: int
    end: int
    phase: int

    @property
    def heads(self) -> int:
        return self.end - self.begin


Segments = Mapping[int, Sequence[Segment]]
"""What each member of a level's group attends with, one segment a KV head."""


class StridedKeys:
    """Where the kept keys (or values) of a level come from, and where they go; the same for every
    layer. Rows travel as they lie, quantised ones too.

    Args:
        sources: members, and `OUTSIDE` where the level sees pages outside of the group.
        pages: of the step's table, whose keys these are; None for all.

    Attributes:
        waits: members whose keys are read in place here.
    """

    def __init__(
        self,
        step: StepState,
        layout: StridedLayout,
        segments: Segments,
        sources: Sequence[int],
        pages: Mask | None = None,
    ) -> None:
        self._step, self._layout, self._segments = step, layout, segments
        phases = {segment.phase for cut in segments.values() for segment in cut}
        self._kept = {(o, p): layout.keys(o, p) for o in sources for p in phases}
        if pages is not None:
            self._kept = {of: kept.of_pages(pages) for of, kept in self._kept.items()}
        self._sources = sources
        self._remote = [m for m in layout.members if not step.same_host(step.me, m)]
        self._networked = step.crosses_hosts
        near = [m for m in layout.members if m not in self._remote and m != step.me]
        mine = segments[step.me]
        self.waits = tuple(m for m in near if any(len(self._kept[m, s.phase]) for s in mine))
        self._buffers: dict[int, Tensor] = {}

    def start(self, pool: Tensor, tag: int) -> tuple[Pending, list[Tensor]] | None:
        """Begin to send this rank's kept rows of one side's pool to members of other hosts; None
        where the whole group is on one."""
        if not self._networked:
            return None
        send, recv = self.leaving(pool), self.rooms(pool)
        return self._step.start(send, recv, tag), recv

    def leaving(self, pool: Tensor) -> list[Tensor]:
        """This rank's kept rows for each member of another host."""
        send = [pool.new_empty(0, pool.shape[-1])] * self._step.size
        for member in self._remote:
            rows = [self._take(pool, self._step.me, segment) for segment in self._segments[member]]
            send[member] = torch.cat(rows) if rows else send[member]
        return send

    def rooms(self, pool: Tensor) -> list[Tensor]:
        """Where those of members of other hosts arrive."""
        recv = [pool.new_empty(0, pool.shape[-1])] * self._step.size
        for member in self._remote:
            recv[member] = pool.new_empty(sum(self._counts(member)), pool.shape[-1])
        return recv

    def gather(self, layer: int, side: int, started: tuple[Pending, list[Tensor]] | None) -> Tensor:
        """Wait for K (side 0) or V (side 1) of the level; ``[segments, units, 1, unit, row]``."""
        step = self._step
        step.wait(layer, self.waits)
        if side not in self._buffers:
            self._buffers[side] = self.buffer(step.context.store.own.k[layer])
        if started is not None:
            step.context.traffic.exposed_s += started[0].wait()
        self.put(layer, side, None if started is None else started[1], self._buffers[side])
        return self.units(self._buffers[side])

    def put(self, layer: int, side: int, came: Sequence[Tensor] | None, buffer: Tensor) -> None:
        """Everyone's rows to their places: those of other hosts as they came, the rest as it lies
        in the pools."""
        pools = self._step.context.store.layer(layer)[side]
        for source in self._sources:
            if came is not None and source in self._remote:
                arrived = list(torch.split(came[source], self._counts(source)))
            else:
                arrived = self._read(pools, source)
            for index, (segment, rows) in enumerate(
                zip(self._segments[self._step.me], arrived, strict=True)
            ):
                buffer[index].index_copy_(0, self._kept[source, segment.phase].places, rows)

    def buffer(self, like: Tensor) -> Tensor:
        """Room for K or V of a layer. Rows beyond a sequence's end are never written, and stay
        zero."""
        tokens = max(1, self._layout.units) * self._layout.unit_tokens
        return like.new_zeros(len(self._segments[self._step.me]), tokens, like.shape[-1])

    def units(self, buffer: Tensor) -> Tensor:
        """``[segments, units, 1, unit, row]``."""
        shape = (max(1, self._layout.units), 1, self._layout.unit_tokens, buffer.shape[2])
        return buffer.view(len(buffer), *shape)

    def _read(self, pools: Sequence[Tensor], source: int) -> list[Tensor]:
        """The rows of a source that can be read in place, by segment."""
        step = self._step
        mine = self._segments[step.me]
        if source == OUTSIDE:
            rows = [self._take_outside(pools, segment) for segment in mine]
        else:
            pool = pools[step.layout.group[source]]
            rows = [self._take(pool, source, segment) for segment in mine]
        if source != step.me:
            traffic = step.context.traffic
            traffic.attention_bytes += sum(r.numel() * r.element_size() for r in rows)
        return rows

    def _take(self, pool: Tensor, source: int, segment: Segment) -> Tensor:
        kept = self._kept[source, segment.phase]
        slots = kept.page_ids % self._step.context.store.shape.slots
        return pool[slots, segment.kv_head, kept.offsets]

    def _take_outside(self, pools: Sequence[Tensor], segment: Segment) -> Tensor:
        kept, slots = self._kept[OUTSIDE, segment.phase], self._step.context.store.shape.slots
        own = self._step.context.store.own.k
        rows = own.new_empty(len(kept), own.shape[-1])
        owners = kept.page_ids // slots
        for sp_rank in torch.unique(owners).tolist():
            at = owners == sp_rank
            page = kept.page_ids[at] % slots
            rows[at] = pools[sp_rank][page, segment.kv_head, kept.offsets[at]]
        return rows

    def _counts(self, source: int) -> list[int]:
        """Rows that this rank gets from a source, by segment."""
        mine = self._segments[self._step.me]
        return [len(self._kept[source, segment.phase]) for segment in mine]


def unreachable(step: StepState, layout: StridedLayout) -> bool:
    """Whether pages outside of the group lie where this rank cannot read them."""
    owners = np.asarray(layout.keys(OUTSIDE, 0).page_ids) // step.context.store.shape.slots
    return not np.asarray(step.context.store.readable)[owners].all()


def unit_pool(keys: Tensor, values: Tensor, index: int) -> PagePool:
    """The units of one segment as a pool of one KV head."""
    return PagePool([keys[index]], [values[index]], keys.shape[1])

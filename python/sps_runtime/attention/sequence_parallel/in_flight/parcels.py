"""Pages between hosts, in parcels: what one block wrote, or what was there before the step.

A page crosses once a layer for each reader, and leaves with the parcel that it belongs to: as soon
as its block has written it, whichever of the reader's blocks will ask for it first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sps_runtime.attention.backend import PagePool, Partial, QueryRun
from sps_runtime.attention.page_reads import cut_pieces, query_runs
from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare, share_partial
from sps_runtime.attention.sequence_parallel.in_flight.flight import LEAD, OLD, Flight, Turn
from sps_runtime.attention.shard_layout import Ints, Runs
from sps_runtime.distributed.communicator import Pending
from sps_runtime.kvstore.transfer import Shipment, Staging
from sps_runtime.ops.merge_state import merge_state

PAGES = 0
"""The kind of their messages."""

Readers = Sequence[Sequence[Runs]]
"""The runs that read KV: of each block, each member's."""


@dataclass(frozen=True)
class Parcels:
    """What crosses in each layer, for one window.

    Attributes:
        staging: where all pages of a layer arrive, source ``parcel * members + owner``.
        sent: per parcel, a shipment for each reader.
        here: per block, runs over pages that are read in place.
        there: per block, runs over staged pages.
        awaits: per block, the parcels that `there` reads.
        members: per block, those whose pages are read in place.
        near_tokens: of other ranks' pages that are read in place, each once.
    """

    staging: Staging
    sent: list[list[Shipment]]
    here: list[list[QueryRun]]
    there: list[list[QueryRun]]
    awaits: list[list[int]]
    members: list[tuple[int, ...]]
    near_tokens: int


@dataclass
class _Arrivals:
    """The pages of one layer on their way here; `left` of the blocks are done with it."""

    pool: Tensor
    pending: list[Pending]
    locks: list[threading.Lock]
    arrived: list[bool]
    done: int = 0


@dataclass
class Courier:
    """Sends and receives the parcels of the layers of one window.

    Args:
        kv_heads: (begin, end) of the KV heads that each member reads.
    """

    flight: Flight
    parcels: Parcels
    window: int | None
    kv_heads: Sequence[tuple[int, int]]
    _arrivals: dict[int, _Arrivals] = field(default_factory=dict)
    _old_sent: set[int] = field(default_factory=set)

    def visit(self, block: int, layer: int) -> None:
        """A block wrote its KV of a layer: have room for what will come, also in some of the next
        layers, so that messages find their receivers; and let go what others need."""
        for ahead in self._alike(layer, LEAD):
            if ahead not in self._arrivals:
                self._arrivals[ahead] = self._expect(ahead)
        for ahead in self._alike(layer, 1):
            if ahead not in self._old_sent:
                self._old_sent.add(ahead)
                self._send(block, ahead, OLD)
        if self.flight.rows[block][0] < self.flight.rows[block][1]:
            self._send(block, layer, 1 + block)

    def attend(
        self, block: int, layer: int, turn: Turn, q_THD: Tensor, share: HeadShare, scale: float
    ) -> Partial:
        """A block's queries, of a share's heads, over the pages that are here, then over those that
        came, in its turn."""
        flight, parcels, window = self.flight, self.parcels, self.window
        backend = flight.context.backend
        flight.read_in_place(turn, layer, parcels.members[block])
        pool = flight.context.pages(layer)
        partial = share_partial(backend, q_THD, parcels.here[block], pool, share, 0, scale, window)
        if not parcels.there[block]:
            return partial
        staged, runs = self._arrived(block, layer, turn), parcels.there[block]
        other = share_partial(backend, q_THD, runs, staged, share, share.kv[0], scale, window)
        return Partial(*merge_state(partial.o, partial.lse, other.o, other.lse))

    def _arrived(self, block: int, layer: int, turn: Turn) -> PagePool:
        """The staged pages of a layer, once those that a block reads have come."""
        arrivals, size = self._arrivals[layer], self.flight.step.size
        staging = self.parcels.staging
        for parcel in self.parcels.awaits[block]:
            if arrivals.arrived[parcel]:
                continue
            with self.flight.baton.lent(turn), arrivals.locks[parcel]:
                if not arrivals.arrived[parcel]:
                    arrivals.pending[parcel].wait()
                    for source in range(parcel * size, (parcel + 1) * size):
                        staging.spread(arrivals.pool, source)
                    arrivals.arrived[parcel] = True
        k, v = arrivals.pool.unbind(1)
        return PagePool([k], [v], staging.slots)

    def leave(self, layer: int) -> None:
        """A block is done with a layer; the last one takes its staged pages away, and counts what
        all of them read in place."""
        arrivals = self._arrivals[layer]
        arrivals.done += 1
        if arrivals.done == len(self.flight.blocks):
            del self._arrivals[layer]
            context, (begin, end) = self.flight.context, self.kv_heads[self.flight.step.me]
            shape = context.store.shape
            near = self.parcels.near_tokens * shape.token_bytes * (end - begin)
            context.traffic.attention_bytes += near // shape.kv_heads

    def _alike(self, layer: int, ahead: int) -> list[int]:
        """A layer, and those of the next `ahead` that have the same window."""
        windows = self.flight.context.windows
        return [layer] + [
            other
            for other in range(layer + 1, min(layer + 1 + ahead, len(windows)))
            if windows[other] == self.window
        ]

    def _send(self, block: int, layer: int, parcel: int) -> None:
        own = self.flight.context.store.own
        messages = [
            shipment.pack(own.k[layer], own.v[layer], heads)
            for shipment, heads in zip(self.parcels.sent[parcel], self.kv_heads, strict=True)
        ]
        self.flight.send(block, PAGES, layer, parcel, messages)

    def _expect(self, layer: int) -> _Arrivals:
        flight, size = self.flight, self.flight.step.size
        begin, end = self.kv_heads[flight.step.me]
        pool, parts = self.parcels.staging.allocate(flight.context.store.own.k[layer], end - begin)
        count = len(self.parcels.sent)
        pending = [
            flight.post(
                PAGES, layer, parcel, [None] * size, parts[parcel * size : (parcel + 1) * size]
            )
            for parcel in range(count)
        ]
        return _Arrivals(pool, pending, [threading.Lock() for _ in pending], [False] * count)


def plan_parcels(flight: Flight, readers: Readers, window: int | None) -> Parcels:
    """What crosses for `readers`, one sequence's blocks.

    Raises:
        ValueError: a page lies neither in the group nor on this host.
    """
    step, layout = flight.step, flight.layout
    size, me, owners = step.size, step.me, layout.pages.owners
    need = [[flight.sees(block, runs, window) for runs in of_block]
            for block, of_block in enumerate(readers)]  # fmt: skip
    union = [np.logical_or.reduce([masks[reader] for masks in need]) for reader in range(size)]
    parcel_of, readable = flight.parcels(), step.readable()
    if (union[me] & ~readable & ~np.isin(owners, layout.group)).any():
        raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")

    def shipped(parcel: int, owner: int, reader: int) -> Ints:
        if step.same_host(owner, reader):
            return np.zeros(0, dtype=np.int64)
        mine = (parcel_of == parcel) & (owners == layout.group[owner])
        return np.flatnonzero(union[reader] & mine)

    parcels = range(len(flight.plans) + 1)
    arriving = [shipped(parcel, owner, me) for parcel in parcels for owner in range(size)]
    staging = Staging([step.shipment(index) for index in arriving])
    place = np.full(len(owners), -1, dtype=np.int32)
    for source, index in enumerate(arriving):
        place[index] = staging.page_ids(source)
    here, there, awaits, members = [], [], [], []
    for block, masks in enumerate(need):
        index, far = np.flatnonzero(masks[me] & readable), np.flatnonzero(masks[me] & ~readable)
        runs = readers[block][me]
        here.append(_runs(flight, block, runs, index, window))
        there.append(_runs(flight, block, runs, far, window, place[far]))
        awaits.append(np.unique(parcel_of[far]).tolist())
        members.append(step.neighbours(masks[me]))
    sent = [
        [step.shipment(shipped(parcel, me, reader)) for reader in range(size)] for parcel in parcels
    ]
    near = union[me] & readable & (owners != step.context.mesh.sp_rank)
    tokens = int(layout.pages.tokens[near].sum())
    return Parcels(staging, sent, here, there, awaits, members, tokens)


def _runs(
    flight: Flight,
    block: int,
    runs: Runs,
    index: Ints,
    window: int | None,
    ids: npt.NDArray[np.int32] | None = None,
) -> list[QueryRun]:
    layout = flight.layouts[block]
    return query_runs(layout, cut_pieces(layout, runs, index, window), index, page_ids=ids)

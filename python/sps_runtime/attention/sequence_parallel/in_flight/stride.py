"""Stride attention in flight: kept keys, queries, values and outputs of one block cross while
others compute (`stride.prefill`).

Every rank attends in every block, with its own heads. A block's keys, queries and values leave when
they are written, in this order; a rank without rows of a block answers it ahead of its own blocks,
because somebody waits for the outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import Partial, QueryRun
from sps_runtime.attention.page_reads import cut_pieces, query_runs
from sps_runtime.attention.sequence_parallel.in_flight.flight import HURRY, LEAD, OLD, Flight, Turn
from sps_runtime.attention.sequence_parallel.stride.counts import StrideCounts
from sps_runtime.attention.sequence_parallel.stride.level import LevelExchange
from sps_runtime.attention.strided_layout import Level, levels_of
from sps_runtime.distributed.communicator import Pending
from sps_runtime.types.attention import SparseCounters

KEYS, VALUES, QUERIES, OUTPUTS = range(4)
"""Kinds of messages of the first level; those of the next follow. Keys and values are numbered by
parcel, the others by block."""


@dataclass
class _Coming:
    """Messages of one kind on their way here, by number, and where they arrive."""

    pending: dict[int, Pending] = field(default_factory=dict)
    rooms: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass
class _Layer:
    """One level in one layer.

    Attributes:
        coming: by kind.
        sides: room for all keys and all values that this rank's heads see.
        locks: for each parcel of keys and values one.
        came: those that have come, and
        placed: those that lie in `sides`.
        done: blocks that are done with the layer.
    """

    coming: list[_Coming]
    sides: tuple[Tensor, Tensor]
    locks: list[threading.Lock]
    came: set[int] = field(default_factory=set)
    placed: set[int] = field(default_factory=set)
    done: int = 0


class FlyingLevel:
    """A level over the blocks and layers of a step.

    Args:
        number: of the level, inner ones first.
    """

    def __init__(
        self, flight: Flight, number: int, level: Level, heads: int, kv_heads: int
    ) -> None:
        self._flight, self._first_kind = flight, 4 * number
        cuts = [[spans[block] for spans in _rows(flight)] for block in range(len(flight.plans))]
        self._exchange = LevelExchange(flight.step, level, heads, kv_heads, cuts=cuts)
        parcels = flight.parcels()
        self._keys = [self._exchange.keys(parcels == p) for p in range(len(flight.plans) + 1)]
        self._layers: dict[int, _Layer] = {}

    def expect(self, layer: int, like: Tensor) -> None:
        """Have room for what will come in a layer, and send what was there before the step."""
        if layer in self._layers:
            return
        own, exchange = self._flight.context.store.own, self._exchange
        pool = own.k[layer]
        rooms: list[dict[int, list[Tensor]]] = [{}, {}, {}, {}]
        for parcel, keys in enumerate(self._keys):
            rooms[KEYS][parcel], rooms[VALUES][parcel] = keys.rooms(pool), keys.rooms(pool)
        for block in range(len(self._flight.plans)):
            rooms[QUERIES][block] = exchange.query_rooms(block, like)
            rooms[OUTPUTS][block] = exchange.output_rooms(block, like)
        sides = self._keys[OLD].buffer(pool), self._keys[OLD].buffer(pool)
        coming = [self._post(kind, layer, each) for kind, each in enumerate(rooms)]
        self._layers[layer] = _Layer(coming, sides, [threading.Lock() for _ in self._keys])

    def send(self, block: int, layer: int, q_THD: Tensor, first: bool) -> None:
        """Let a block's keys, queries and values leave; with the `first` what is older."""
        own = self._flight.context.store.own
        parcels = (OLD, 1 + block) if first else (1 + block,)
        for parcel in parcels:
            self._send(block, KEYS, layer, parcel, self._keys[parcel].leaving(own.k[layer]))
        self._send(block, QUERIES, layer, block, self._exchange.queries(block, q_THD))
        for parcel in parcels:
            self._send(block, VALUES, layer, parcel, self._keys[parcel].leaving(own.v[layer]))

    def answer(
        self, block: int, layer: int, turn: Turn, q_THD: Tensor, scale: float
    ) -> list[Partial]:
        """What all members' queries of a block find with this rank's heads; others' leave."""
        state = self._layers[layer]
        parcels = range(2 + block)
        with self._flight.baton.lent(turn):
            for parcel in parcels:
                self._arrive(state, parcel)
            _wait(state.coming[QUERIES], block)
        for parcel in parcels:
            self._place(layer, state, parcel)
        kv = self._keys[OLD].units(state.sides[0]), self._keys[OLD].units(state.sides[1])
        queries = state.coming[QUERIES].rooms.pop(block)
        found = self._exchange.attend(block, q_THD, queries, kv, scale)
        outputs = self._exchange.outputs(block, found, q_THD.dtype)
        self._send(block, OUTPUTS, layer, block, outputs)
        return found

    def merge(
        self, block: int, layer: int, found: Sequence[Partial], into: Partial, like: Tensor
    ) -> None:
        """Into the block's own partial what its queries found elsewhere."""
        state = self._layers[layer]
        with self._flight.baton.lent((layer, block)):
            _wait(state.coming[OUTPUTS], block)
        came = state.coming[OUTPUTS].rooms.pop(block)
        self._exchange.merge(block, found, came, into, like.dtype)
        state.done += 1
        if state.done == len(self._flight.blocks):
            del self._layers[layer]

    def waits(self) -> tuple[int, ...]:
        """Members whose keys are read in place."""
        return tuple(sorted({member for keys in self._keys for member in keys.waits}))

    def _arrive(self, state: _Layer, parcel: int) -> None:
        with state.locks[parcel]:
            if parcel not in state.came:
                for kind in (KEYS, VALUES):
                    _wait(state.coming[kind], parcel)
                state.came.add(parcel)

    def _place(self, layer: int, state: _Layer, parcel: int) -> None:
        """With the baton: one thread at a time."""
        if parcel not in state.placed:
            state.placed.add(parcel)
            for side, buffer in enumerate(state.sides):
                came = state.coming[side].rooms.pop(parcel)
                self._keys[parcel].put(layer, side, came, buffer)

    def _post(self, kind: int, layer: int, rooms: dict[int, list[Tensor]]) -> _Coming:
        nothing: list[Tensor | None] = [None] * self._flight.step.size
        coming = _Coming(rooms=rooms)
        for number, recv in rooms.items():
            if any(len(room) for room in recv):
                coming.pending[number] = self._flight.post(
                    self._first_kind + kind, layer, number, nothing, recv
                )
        return coming

    def _send(
        self, block: int, kind: int, layer: int, number: int, messages: Sequence[Tensor]
    ) -> None:
        if any(len(message) for message in messages):
            self._flight.send(block, self._first_kind + kind, layer, number, messages)


class FlyingStride:
    """`flight.Flying`."""

    everywhere = True

    def __init__(self, flight: Flight) -> None:
        self._flight, step = flight, flight.step
        settings = flight.layout.sparse[0]
        assert settings is not None
        self._plans = levels_of(settings, step.size)
        self._counts = StrideCounts(step, self._plans)
        self._sent_before = step.context.traffic.attention_bytes
        self._levels: list[FlyingLevel] = []
        self._near: tuple[int, ...] = ()
        self._local = [self._local_runs(block) for block in range(len(flight.plans))]
        self._begun: set[int] = set()

    def wrote(self, block: int, layer: int) -> None:
        return

    def finish(self) -> None:
        layers = self._flight.context.store.shape.layers
        sent = self._flight.context.traffic.attention_bytes - self._sent_before
        for layer in range(layers):
            self._counts.add(0 if layer else sent)

    def counters(self) -> tuple[SparseCounters, ...]:
        """As `stride.prefill.Stride.counters`."""
        return self._counts.of_sequences()

    def attend(
        self,
        block: int,
        layer: int,
        q_THD: Tensor,
        kv_heads: int,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        if window is not None:
            raise ValueError("layers with a window do not fly under csa")
        flight = self._flight
        self._visit(block, layer, q_THD, kv_heads)
        turn = (layer, block) if len(q_THD) else (layer - HURRY, block)
        flight.baton.offer(turn)
        flight.follow(block, layer, turn)
        flight.read_in_place(turn, layer, self._near)
        pool = flight.context.pages(layer)
        own = flight.context.backend.partial(q_THD, self._local[block], pool, scale=scale)
        found = [level.answer(block, layer, turn, q_THD, scale) for level in self._levels]
        for level, partials in zip(self._levels, found, strict=True):
            level.merge(block, layer, partials, own, q_THD)
        return own.o.to(q_THD.dtype)

    def _visit(self, block: int, layer: int, q_THD: Tensor, kv_heads: int) -> None:
        flight = self._flight
        if not self._levels:
            self._levels = [
                FlyingLevel(flight, number, plan, q_THD.shape[1], kv_heads)
                for number, plan in enumerate(self._plans)
            ]
            self._near = tuple(sorted({m for level in self._levels for m in level.waits()}))
        for ahead in range(layer, min(layer + LEAD, flight.context.store.shape.layers)):
            for level in self._levels:
                level.expect(ahead, q_THD)
        first = layer not in self._begun
        self._begun.add(layer)
        for level in self._levels:
            level.send(block, layer, q_THD, first)

    def _local_runs(self, block: int) -> list[QueryRun]:
        flight, layout = self._flight, self._flight.layouts[block]
        own = np.flatnonzero(layout.pages.owners == flight.context.mesh.sp_rank)
        rows = layout.runs(flight.step.me)
        return query_runs(layout, cut_pieces(layout, rows, own, None), own)


def _rows(flight: Flight) -> list[list[tuple[int, int]]]:
    """Of each member, each block's rows (begin, end) among the step's."""
    found = []
    for member in range(flight.step.size):
        counts = [layout.rows[member] for layout in flight.layouts]
        ends = np.cumsum(counts).tolist()
        found.append(list(zip([0, *ends[:-1]], ends, strict=True)))
    return found


def _wait(coming: _Coming, number: int) -> None:
    pending = coming.pending.get(number)
    if pending is not None:
        pending.wait()

"""Questions for pages of other hosts, in flight: an owner's side, and what a reader waits for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sps_runtime.attention.page_reads import Mask
from sps_runtime.attention.sequence_parallel.csa.far_pages import (
    FarPages,
    Units,
    bits_room,
    unpack_bits,
)
from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.distributed.communicator import Pending

SUMMARIES, QUESTION, KEYS, VALUES = range(4)
"""Kinds of messages. Summaries are numbered by parcel, the others by the reader's block."""


@dataclass
class Coming:
    """Summaries of one layer on their way here, by parcel, and where they arrive, by owner."""

    pending: dict[int, Pending]
    rooms: dict[int, list[Tensor | None]]
    locks: dict[int, threading.Lock]
    known: set[int] = field(default_factory=set)


@dataclass
class Answer:
    """Pages of one question on their way here: of each owner units, and where they arrive, keys
    and values."""

    units: list[Units]
    parts: list[list[Tensor | None]]
    pending: list[Pending]
    wanted: Mask
    lock: threading.Lock = field(default_factory=threading.Lock)
    came: bool = False


@dataclass(frozen=True)
class Clerk:
    """Answers one block of one reader, layer by layer.

    Attributes:
        index: places of own pages that the block may ask for.
    """

    flight: Flight
    far: FarPages
    reader: int
    block: int
    index: Ints

    def serve(self) -> None:
        """Until the last layer; where a peer is lost, the flight fails."""
        sent: list[Pending] = []
        layers = range(self.flight.context.store.shape.layers)
        try:
            asked = [self._expect(layer) for layer in layers]
            for layer, (bits, pending) in zip(layers, asked, strict=True):
                pending.wait()
                sent += self._answer(layer, bits)
            for pending in sent:
                pending.wait()
        except ConnectionError:
            self.flight.baton.fail()

    def _expect(self, layer: int) -> tuple[Tensor | None, Pending]:
        bits = bits_room(len(self.index), self.far.kv_heads)
        room = self._to_reader(bits)
        return bits, self.flight.post(QUESTION, layer, self.block, self._to_reader(None), room)

    def _answer(self, layer: int, bits: Tensor | None) -> list[Pending]:
        flight, far, nothing = self.flight, self.far, self._to_reader(None)
        own = flight.context.store.own
        wanted = np.zeros((far.table, far.kv_heads), dtype=np.bool_)
        unpack_bits(bits, wanted, self.index)
        units = Units(flight.step, wanted, self.index)
        return [
            flight.post(kind, layer, self.block, self._to_reader(units.take(pool[layer])), nothing)
            for kind, pool in ((KEYS, own.k), (VALUES, own.v))
        ]

    def _to_reader(self, message: Tensor | None) -> list[Tensor | None]:
        """One message among the group's."""
        found: list[Tensor | None] = [None] * self.flight.step.size
        found[self.reader] = message
        return found

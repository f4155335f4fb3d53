"""Questions for pages of other hosts, in flight: an owner's side, and what a reader waits for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.audit_routes import AuditRoute
from sps_runtime.attention.page_reads import Mask
from sps_runtime.attention.sequence_parallel.csa.bound import WIDENINGS
from sps_runtime.attention.sequence_parallel.csa.far_pages import (
    FarPages,
    Units,
    bits_room,
    unpack_bits,
)
from sps_runtime.attention.sequence_parallel.in_flight.flight import HURRY, Flight
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.distributed.communicator import Pending

SUMMARIES, QUERIES, WEIGHTS = range(3)
"""Kinds of messages. Summaries are numbered by parcel, all others by the reader's block."""
QUESTIONS, KEYS, VALUES = (tuple(range(kind, 3 * (2 + WIDENINGS), 3)) for kind in (3, 4, 5))
"""The same: a question and its answer for the first choice, and for each that widens it."""


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
        questions: kinds of the questions that it asks in each layer, in order.
        route: the audited rows that it sends; None for none.
        like_THD: queries of no row.
    """

    flight: Flight
    far: FarPages
    reader: int
    block: int
    index: Ints
    questions: tuple[int, ...]
    route: AuditRoute | None
    like_THD: Tensor
    scale: float

    def serve(self) -> None:
        """Until the last layer; where a peer is lost, the flight fails."""
        sent: list[Pending] = []
        layers = range(self.flight.context.store.shape.layers)
        try:
            asked = [[self._expect(kind, layer) for kind in self.questions] for layer in layers]
            for layer, questions in zip(layers, asked, strict=True):
                sent += self._serve_layer(layer, questions)
            for pending in sent:
                pending.wait()
        except ConnectionError:
            self.flight.baton.fail()
        except Exception:
            self.flight.baton.fail()
            raise  # to be printed: no other thread is told why

    def _serve_layer(
        self, layer: int, questions: list[tuple[Tensor | None, Pending]]
    ) -> list[Pending]:
        """Answer a layer: what it returns is leaving."""
        rows = self._expect_rows(layer)  # no sooner: they are large
        sent: list[Pending] = []
        for number, (bits, pending) in enumerate(questions):
            pending.wait()
            sent += self._answer(number, layer, bits)
            if number == 0 and rows is not None:
                sent.append(self._weigh(layer, *rows))
        return sent

    def _expect(self, kind: int, layer: int) -> tuple[Tensor | None, Pending]:
        bits = bits_room(len(self.index), self.far.kv_heads)
        room = self._to_reader(bits)
        return bits, self.flight.post(kind, layer, self.block, self._to_reader(None), room)

    def _expect_rows(self, layer: int) -> tuple[AuditRoute, Tensor, Pending] | None:
        if self.route is None:
            return None
        rows_RHD = self.like_THD.new_empty(len(self.route.rows), *self.like_THD.shape[1:])
        room = self._to_reader(rows_RHD)
        pending = self.flight.post(QUERIES, layer, self.block, self._to_reader(None), room)
        return self.route, rows_RHD, pending

    def _answer(self, number: int, layer: int, bits: Tensor | None) -> list[Pending]:
        flight, far, nothing = self.flight, self.far, self._to_reader(None)
        own = flight.context.store.own
        wanted = np.zeros((far.table, far.kv_heads), dtype=np.bool_)
        unpack_bits(bits, wanted, self.index)
        units = Units(flight.step, wanted, self.index)
        return [
            flight.post(kind, layer, self.block, self._to_reader(units.take(pool[layer])), nothing)
            for kind, pool in ((KEYS[number], own.k), (VALUES[number], own.v))
        ]

    def _weigh(self, layer: int, route: AuditRoute, rows_RHD: Tensor, coming: Pending) -> Pending:
        """Compute weights ahead of own blocks: the reader's block waits for them."""
        flight, blocks = self.flight, len(self.flight.plans)
        coming.wait()
        flight.baton.take((layer - HURRY, (1 + self.reader) * blocks + self.block))  # no block's
        try:
            pool, backend = flight.context.pages(layer), flight.context.backend
            with torch.inference_mode():
                lse_RH = route.weigh(rows_RHD, pool, backend, self.scale)
        finally:
            flight.baton.give()
        answer = self._to_reader(lse_RH)
        return flight.post(WEIGHTS, layer, self.block, answer, self._to_reader(None))

    def _to_reader(self, message: Tensor | None) -> list[Tensor | None]:
        """One message among the group's."""
        found: list[Tensor | None] = [None] * self.flight.step.size
        found[self.reader] = message
        return found

"""Weights of audited rows over pages of other hosts, in flight: the reader's side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sps_runtime.attention.audit_routes import AuditRoute
from sps_runtime.attention.sequence_parallel.csa.bound import Bound
from sps_runtime.attention.sequence_parallel.csa.counts import SparseCounts
from sps_runtime.attention.sequence_parallel.csa.far_weights import member_route
from sps_runtime.attention.sequence_parallel.in_flight.far_answers import QUERIES, WEIGHTS
from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.attention.sparse_blocks import SparseBlocks, sparse_blocks, split_runs
from sps_runtime.distributed.communicator import Pending


@dataclass(frozen=True)
class ComingWeights:
    """Weights of one block and layer on their way here, of each owner that was asked."""

    routes: list[AuditRoute]
    rooms: list[Tensor]
    pending: Pending


class FlyingWeights:
    """Audited rows leave before their block chooses; weights are needed once it has attended."""

    def __init__(self, flight: Flight, counts: SparseCounts) -> None:
        self._flight, self._counts = flight, counts
        self.route = cache(self._route)
        """(block, owner, reader) -> what they exchange in each layer; None for nothing."""
        self._sparse = cache(self._sparse_of)

    def ask(self, block: int, layer: int, q_AHD: Tensor) -> ComingWeights | None:
        """Let a block's audited rows leave; None where nobody is asked."""
        flight = self._flight
        me, size = flight.step.me, flight.step.size
        routes = [self.route(block, owner, me) for owner in range(size)]
        messages = [None if route is None else q_AHD[route.rows] for route in routes]
        rooms = [
            None if rows is None else rows.new_empty(rows.shape[:2], dtype=torch.float32)
            for rows in messages
        ]
        asked = [route for route in routes if route is not None]
        if not asked:
            return None
        came = [room for room in rooms if room is not None]
        for route in asked:
            self._counts.weigh(route.sequences, q_AHD)
        pending = flight.post(WEIGHTS, layer, block, [None] * size, rooms)
        flight.send(block, QUERIES, layer, block, messages)
        return ComingWeights(asked, came, pending)

    def add(self, block: int, layer: int, coming: ComingWeights, bound: Bound) -> None:
        """Wait for the weights, and add them to those of rows that have attended."""
        self._flight.wait((layer, block), [coming.pending])
        for route, room in zip(coming.routes, coming.rooms, strict=True):
            route.add(bound.lse_RH, room)

    def _route(self, block: int, owner: int, reader: int) -> AuditRoute | None:
        found = self._sparse(block, reader)
        return member_route(self._flight.steps[block], found, owner, reader)

    def _sparse_of(self, block: int, reader: int) -> list[SparseBlocks]:
        """A reader's query blocks that choose; the same whoever is asked."""
        layout = self._flight.layouts[block]
        runs, _ = split_runs(layout, reader)
        return sparse_blocks(layout, runs)

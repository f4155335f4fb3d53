"""Ulysses in flight: queries, keys, values and outputs of one block cross while others compute.

Every rank attends to all tokens of every block, with its own heads. Outputs return block by block,
and their projection starts at once (`flight`, `exact.ulysses`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare
from sps_runtime.attention.sequence_parallel.exact.ulysses import head_shares, laid_end_to_end
from sps_runtime.attention.sequence_parallel.in_flight.flight import BEGIN, HURRY, Flight, Turn
from sps_runtime.attention.sequence_parallel.in_flight.parcels import Courier, plan_parcels
from sps_runtime.distributed.communicator import Pending

QUERIES, OUTPUTS = 1, 2
"""Kinds of messages beside `parcels.PAGES`, numbered by block."""


@dataclass
class _Layer:
    """What comes in one layer, by block: queries of all members for this rank's heads, and this
    rank's outputs of the others' heads."""

    queries: list[tuple[Tensor, Pending]]
    outputs: list[tuple[list[Tensor], Pending]]
    done: int = 0


class FlyingUlysses:
    """`flight.Flying`."""

    everywhere = True

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._rows = [layout.rows for layout in flight.layouts]
        self._couriers: dict[int | None, Courier] = {}
        self._layers: dict[int, _Layer] = {}

    def wrote(self, block: int, layer: int) -> None:
        return

    def finish(self) -> None:
        return

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
        flight, size = self._flight, self._flight.step.size
        split = head_shares(q_THD.shape[1], kv_heads, size)
        share = split[flight.step.me]
        courier = self._courier(window, split)
        courier.visit(block, layer)
        for ahead in range(layer, min(layer + 2, flight.context.store.shape.layers)):
            if ahead not in self._layers:
                self._layers[ahead] = self._expect(ahead, q_THD, split)
        queries, coming = self._layers[layer].queries[block]
        self._send_queries(block, layer, q_THD, split, queries)
        first = self._before_others(block, layer)
        flight.go_on(block, layer, first)
        flight.wait(first, [coming])
        partial = courier.attend(block, layer, first, queries, share, scale)
        out_THD = self._swap_back(block, layer, partial.o.to(q_THD.dtype))
        courier.leave(layer)
        self._leave(layer)
        return out_THD

    def _before_others(self, block: int, layer: int) -> Turn:
        """Attention is short, and every rank waits for its outputs: it goes first, but in the first
        layer only when all blocks have begun."""
        return (layer - HURRY, block) if layer else (BEGIN, len(self._flight.plans) + block)

    def _expect(self, layer: int, like: Tensor, split: Sequence[HeadShare]) -> _Layer:
        """Have room for what all blocks of a layer will be sent."""
        me, dim = self._flight.step.me, like.shape[2]
        heads = [share.q[1] - share.q[0] for share in split]
        found = _Layer([], [])
        for block, rows in enumerate(self._rows):
            all_rows = like.new_empty(sum(rows), heads[me], dim)
            pending = self._post(QUERIES, layer, block, list(all_rows.split(list(rows))))
            found.queries.append((all_rows, pending))
            parts = [like.new_empty(rows[me], count, dim) for count in heads]
            found.outputs.append((parts, self._post(OUTPUTS, layer, block, parts)))
        return found

    def _post(self, kind: int, layer: int, block: int, recv: Sequence[Tensor]) -> Pending:
        me, size = self._flight.step.me, self._flight.step.size
        others = [part if member != me else None for member, part in enumerate(recv)]
        return self._flight.post(kind, layer, block, [None] * size, others)

    def _send_queries(
        self,
        block: int,
        layer: int,
        q_THD: Tensor,
        split: Sequence[HeadShare],
        queries: Tensor,
    ) -> None:
        me = self._flight.step.me
        parts = [q_THD[:, share.q[0] : share.q[1]].contiguous() for share in split]
        queries.split(list(self._rows[block]))[me].copy_(parts[me])
        self._send(block, QUERIES, layer, parts)

    def _swap_back(self, block: int, layer: int, o_all: Tensor) -> Tensor:
        """Outputs of this rank's rows, all heads; those of other rows leave."""
        me = self._flight.step.me
        send = list(o_all.split(list(self._rows[block])))
        self._send(block, OUTPUTS, layer, send)
        parts, coming = self._layers[layer].outputs[block]
        self._flight.wait((layer, block), [coming])
        parts[me] = send[me]
        return torch.cat(parts, dim=1)

    def _send(self, block: int, kind: int, layer: int, parts: Sequence[Tensor]) -> None:
        me = self._flight.step.me
        others = [part if member != me else None for member, part in enumerate(parts)]
        self._flight.send(block, kind, layer, block, others)

    def _leave(self, layer: int) -> None:
        state = self._layers[layer]
        state.done += 1
        if state.done == len(self._flight.blocks):
            del self._layers[layer]

    def _courier(self, window: int | None, split: Sequence[HeadShare]) -> Courier:
        courier = self._couriers.get(window)
        if courier is None:
            flight, size = self._flight, self._flight.step.size
            everyone = [
                laid_end_to_end([layout.runs(member) for member in range(size)])
                for layout in flight.layouts
            ]
            parcels = plan_parcels(flight, [[runs] * size for runs in everyone], window)
            courier = Courier(flight, parcels, window, [share.kv for share in split])
            self._couriers[window] = courier
        return courier

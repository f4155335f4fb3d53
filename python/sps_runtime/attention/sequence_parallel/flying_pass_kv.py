"""Pass-KV in flight: KV of one block crosses while others compute (`in_flight`)."""

from __future__ import annotations

from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.sequence_parallel.in_flight import Flight
from sps_runtime.attention.sequence_parallel.parcels import Courier, plan_parcels
from sps_runtime.ops.merge_state import merge_state


class FlyingPassKV:
    """`in_flight.Flying`: pages that are here are attended to first, then those that came."""

    everywhere = False

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._couriers: dict[int | None, Courier] = {}

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
        flight, backend = self._flight, self._flight.context.backend
        courier = self._courier(window, kv_heads)
        courier.visit(block, layer)
        flight.go_on(block, layer)
        parcels = courier.parcels
        flight.read_in_place((layer, block), layer, parcels.members[block])
        pool = flight.context.pages(layer)
        partial = backend.partial(q_THD, parcels.here[block], pool, scale=scale, window=window)
        if parcels.there[block]:
            staged = courier.arrived(block, layer)
            runs = parcels.there[block]
            other = backend.partial(q_THD, runs, staged, scale=scale, window=window)
            partial = Partial(*merge_state(partial.o, partial.lse, other.o, other.lse))
        courier.leave(layer)
        return partial.o.to(q_THD.dtype)

    def _courier(self, window: int | None, kv_heads: int) -> Courier:
        courier = self._couriers.get(window)
        if courier is None:
            flight, size = self._flight, self._flight.step.size
            readers = [[layout.runs(member) for member in range(size)] for layout in flight.layouts]
            parcels = plan_parcels(flight, readers, window)
            courier = Courier(flight, parcels, window, [(0, kv_heads)] * size)
            self._couriers[window] = courier
        return courier

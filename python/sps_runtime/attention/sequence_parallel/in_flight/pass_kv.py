"""Pass-KV in flight: KV of one block crosses while others compute (`flight`)."""

from __future__ import annotations

from torch import Tensor

from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare
from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.attention.sequence_parallel.in_flight.parcels import Courier, plan_parcels


class FlyingPassKV:
    """`flight.Flying`: pages that are here are attended to first, then those that came."""

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
        courier = self._courier(window, kv_heads)
        courier.visit(block, layer)
        turn = (layer, block)
        self._flight.go_on(block, layer, turn)
        heads = q_THD.shape[1]
        share = HeadShare.of(0, heads, heads // kv_heads)
        partial = courier.attend(block, layer, turn, q_THD, share, scale)
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

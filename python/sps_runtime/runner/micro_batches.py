"""The model's forward over the blocks of a step, each in a thread, one of which computes at a time
(`attention.sequence_parallel.in_flight`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.layers.placement import GroupLinks, WholeWeights
from sps_runtime.layers.step import StepContext
from sps_runtime.ops.weight import Weight
from sps_runtime.runner.input_batch import InputBatch

Forward = Callable[[Tensor, StepContext], Tensor]


@dataclass(frozen=True)
class _Interrupted(WholeWeights):
    """Multiplications take most of a block's time; before each, others may go first."""

    offer: Callable[[], None] = lambda: None

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        self.offer()
        return super().column(x_TD, weight_ND, bias_N, unit)

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        self.offer()
        return super().row(y_TN, weight_DN, unit)


def fly(forward: Forward, flight: Flight, batch: InputBatch, links: GroupLinks) -> Tensor:
    """All blocks' hidden states ``[my tokens, hidden]``, in the order of the step's rows.

    Raises:
        ConnectionError: a peer is gone or late.
        Exception: what a block's forward raised; the other blocks end with it.
    """
    found: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def run(block: int) -> None:
        try:
            flight.baton.take(flight.turns[block])
            with torch.inference_mode():
                found[block] = _forward(forward, flight, block, batch, links)
            flight.baton.give()
        except BaseException as error:
            errors.append(error)
            flight.baton.fail()

    blocks = flight.blocks
    threads = [threading.Thread(target=run, args=(b,), name=f"block-{b}") for b in blocks]
    flight.baton.expect(flight.turns.values())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    flight.finish()
    return torch.cat([found[block] for block in blocks])


def _forward(
    forward: Forward, flight: Flight, block: int, batch: InputBatch, links: GroupLinks
) -> Tensor:
    rows = slice(*flight.rows[block])
    context = StepContext(
        positions_T=batch.positions_T[rows],
        linear=_Interrupted(links, flight.context.ops, partial(flight.offer, block)),
        attend=flight.attention(block),
    )
    return forward(batch.tokens_T[rows], context)

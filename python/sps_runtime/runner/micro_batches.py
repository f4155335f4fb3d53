"""The model's forward over the blocks of a step, each in a thread, one of which computes at a time
(`attention.sequence_parallel.in_flight`)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from sps_runtime.attention.sequence_parallel.in_flight import Flight
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.layers.step import StepContext
from sps_runtime.runner.input_batch import InputBatch

Forward = Callable[[Tensor, StepContext], Tensor]


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
            flight.baton.take((0, block))
            with torch.inference_mode():
                found[block] = _forward(forward, flight, block, batch, links)
            flight.baton.give()
        except BaseException as error:
            errors.append(error)
            flight.baton.fail()

    blocks = flight.blocks
    threads = [threading.Thread(target=run, args=(b,), name=f"block-{b}") for b in blocks]
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
        linear=place("sharded", "ntp", links, flight.layouts[block].rows, flight.context.ops),
        attend=flight.attention(block),
    )
    return forward(batch.tokens_T[rows], context)

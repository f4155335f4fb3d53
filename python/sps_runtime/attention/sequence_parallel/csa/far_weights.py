"""Weights of audited rows over pages of other hosts, in a step in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.attention.audit_routes import AuditRoute, audit_route
from sps_runtime.attention.sequence_parallel.csa.counts import SparseCounts
from sps_runtime.attention.sequence_parallel.csa.rows import SparseRows
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_blocks import SparseBlocks
from sps_runtime.distributed.communicator import Pending

TAG = 1
"""Of rows that travel while other messages of the step do."""


def member_route(
    step: StepState, found: Sequence[SparseBlocks], owner: int, reader: int
) -> AuditRoute | None:
    """What a reader of the step asks of another member; None for nothing.

    Args:
        found: the reader's query blocks.
    """
    if step.same_host(owner, reader):
        return None
    layout, kv_heads = step.layout, step.context.store.shape.kv_heads
    return audit_route(layout, found, layout.pages.owners == layout.group[owner], kv_heads)


class FarWeights:
    """Rows travel to the owners of pages before their superblocks (`send`), and weights come back
    (`add`): collective calls, once a layer each.

    Args:
        found: the sparse blocks of each member.
    """

    def __init__(
        self, step: StepState, counts: SparseCounts, found: Sequence[Sequence[SparseBlocks]]
    ) -> None:
        self._step, self._counts = step, counts
        me, members = step.me, range(step.size)
        self._asked = [member_route(step, found[me], owner, me) for owner in members]
        self._guests = [member_route(step, found[reader], me, reader) for reader in members]
        self._came: list[Tensor] = []
        self._coming: Pending | None = None

    def send(self, parts: Sequence[SparseRows], q_THD: Tensor) -> None:
        """Let audited rows leave, before anything is chosen."""
        q_AHD = torch.cat([q_THD[:0], *(part.audited_queries() for part in parts)])
        self._came = _room(self._guests, q_AHD)
        rows = [q_AHD[:0] if route is None else q_AHD[route.rows] for route in self._asked]
        for route in self._asked:
            if route is not None:
                self._counts.weigh(route.sequences, q_AHD)
        self._coming = self._step.start(rows, self._came, TAG)

    def add(self, layer: int, parts: Sequence[SparseRows], scale: float) -> None:
        """Answer, and add what owners answer to the weights of rows that have attended."""
        assert self._coming is not None
        context = self._step.context
        context.traffic.exposed_s += self._coming.wait()
        pool, backend = context.pages(layer), context.backend
        nothing = self._came[0].new_empty(0, self._came[0].shape[1], dtype=torch.float32)
        answers = [
            nothing if route is None else route.weigh(q_RHD, pool, backend, scale)
            for route, q_RHD in zip(self._guests, self._came, strict=True)
        ]
        back = _room(self._asked, nothing)
        self._step.communicate(answers, back)
        bounds = [part.bound for part in parts if part.bound is not None and part.asks_owners]
        lse_AH = torch.cat([nothing, *(bound.lse_RH for bound in bounds)])
        for route, answer in zip(self._asked, back, strict=True):
            if route is not None:
                route.add(lse_AH, answer)
        each = lse_AH.split([len(bound.lse_RH) for bound in bounds])
        for bound, lse_RH in zip(bounds, each, strict=True):
            bound.lse_RH = lse_RH


def _room(routes: Sequence[AuditRoute | None], like: Tensor) -> list[Tensor]:
    """For the rows of each route, one after another; `like` has one of them, or none."""
    sizes = [0 if route is None else len(route.rows) for route in routes]
    return [like.new_empty(size, *like.shape[1:]) for size in sizes]

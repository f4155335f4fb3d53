"""Pass-Q: KV stays where it lies, queries travel, and (o, lse) comes back.

Every owner in the group attends with the queries that see some of its pages, the home rank merges.
Meta's context parallelism uses it for prefill behind a long cached prefix; with one new token a
sequence it is sequence-parallel decode (LoongServe's multi-master decode, Infinite-LLM's
DistAttention): a token's home is the owner of its page, so no KV ever moves. Bytes per query, layer
and remote owner: ``Hq d b`` there and ``Hq (d b + 4)`` back, whatever the context's length.

Committed pages on a rank of this host outside the group are read in place by the query's home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial, QueryRun
from sps_runtime.attention.page_reads import (
    Pieces,
    RowSet,
    cut_pieces,
    needed,
    packed_rows,
    query_runs,
)
from sps_runtime.attention.sequence_parallel.exact.partials import (
    merge_home,
    pack,
    packed_bytes,
    unpack,
)
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints


@dataclass(frozen=True)
class _Routes:
    """Whose queries go where, for one window.

    Attributes:
        runs: this rank's queries over what it reads itself, and queries that arrived, behind its
            own in one tensor, over its own pages.
        rows_out: per member, this rank's rows that go there.
        counts_in: per member, how many rows come from there.
        outside_tokens: tokens read in place outside the group.
    """

    runs: list[QueryRun]
    rows_out: list[RowSet]
    counts_in: list[int]
    outside_tokens: int


class PassQ:
    """`layers.step.SequenceAttention` of one step."""

    def __init__(self, step: StepState) -> None:
        self._step = step
        self._routes: dict[int | None, _Routes] = {}

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        step = self._step
        step.write(layer, k_TKD, v_TKD)
        routes = self._routes.get(window)
        if routes is None:
            routes = self._routes[window] = self._plan(window)
        all_q = self._gather_queries(q_THD, routes)
        step.count_in_place(routes.outside_tokens)
        partial = step.context.backend.partial(
            all_q,
            routes.runs,
            step.context.pages(layer),
            scale=scale,
            window=window,
        )
        return self._return_partials(partial.o, partial.lse, q_THD, routes)

    def _gather_queries(self, q_THD: Tensor, routes: _Routes) -> Tensor:
        """This rank's queries, then those that each member sent."""
        step = self._step
        rows = len(q_THD)
        all_q = q_THD.new_empty((rows + sum(routes.counts_in), *q_THD.shape[1:]))
        all_q[:rows] = q_THD  # what is sent is taken from here: q may be strided, this is not
        recv = list(torch.split(all_q[rows:], routes.counts_in))
        step.communicate([out.take(all_q[:rows]) for out in routes.rows_out], recv)
        return all_q

    def _return_partials(
        self, o_THD: Tensor, lse_TH: Tensor, q_THD: Tensor, routes: _Routes
    ) -> Tensor:
        """Send guests' partials home, and merge what comes home into this rank's own."""
        rows, heads, dim = q_THD.shape
        sizes = [rows, *routes.counts_in]
        own_o, *guest_o = torch.split(o_THD, sizes)
        own_lse, *guest_lse = torch.split(lse_TH, sizes)
        send = [pack(o, lse, q_THD.dtype) for o, lse in zip(guest_o, guest_lse, strict=True)]
        recv = [
            send[0].new_empty(packed_bytes(out.count, heads, dim, q_THD.dtype))
            for out in routes.rows_out
        ]
        self._step.communicate(send, recv)
        merged = torch.empty_like(q_THD)
        home = [
            (out, unpack(message, out.count, heads, dim, q_THD.dtype))
            for out, message in zip(routes.rows_out, recv, strict=True)
            if out.count
        ]
        merge_home(self._step.context.backend, Partial(own_o, own_lse), home, merged)
        return merged

    def _plan(self, window: int | None) -> _Routes:
        step, layout = self._step, self._step.layout
        owners, mine = layout.pages.owners, step.context.mesh.sp_rank
        runs = layout.runs(step.me)
        outside = ~np.isin(owners, layout.group)
        read_here = np.flatnonzero(outside | (owners == mine))
        if (outside & needed(layout, runs, window) & ~step.readable()).any():
            raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")
        own_runs = query_runs(layout, cut_pieces(layout, runs, read_here, window), read_here)
        owned = np.flatnonzero(owners == mine)
        guests = [
            self._pieces(member, owned, window) if member != step.me else None
            for member in range(step.size)
        ]
        sent = [
            self._pieces(step.me, np.flatnonzero(owners == sp_rank), window)
            if sp_rank != mine
            else None
            for sp_rank in layout.group
        ]
        counts = [0 if g is None else int(g.runs.count.sum()) for g in guests]
        guest_runs: list[QueryRun] = []
        offset = layout.rows[step.me]
        for pieces, count in zip(guests, counts, strict=True):
            if pieces is not None:
                guest_runs += query_runs(layout, pieces, owned, rows=packed_rows(pieces, offset))
            offset += count
        return _Routes(
            runs=own_runs + guest_runs,
            rows_out=[RowSet(_rows(pieces), layout.rows[step.me]) for pieces in sent],
            counts_in=counts,
            outside_tokens=int(layout.pages.tokens[outside & needed(layout, runs, window)].sum()),
        )

    def _pieces(self, member: int, index: Ints, window: int | None) -> Pieces:
        return cut_pieces(self._step.layout, self._step.layout.runs(member), index, window)


def _rows(pieces: Pieces | None) -> Ints:
    return np.zeros(0, dtype=np.int64) if pieces is None else pieces.rows()

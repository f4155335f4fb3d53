"""Attention where every rank computed every token: nobody's query travels.

With linear layers cut over the group (small decode batches), each rank has all queries, all heads
of its TP slice. The owner of a new token's page writes its KV; every rank attends with all queries
over its own pages, and partials are exchanged by head share: a rank ends with the complete output
of the heads whose columns of the output projection it multiplies. Bytes sent per query, layer and
rank: ``Hq (d b + 4) (P - 1) / P``.

Committed pages on a rank of this host outside the group are dealt to members by SP rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial, QueryRun
from sps_runtime.attention.page_reads import RowSet, cut_pieces, needed, query_runs
from sps_runtime.attention.sequence_parallel.exact.partials import (
    merge_home,
    pack,
    packed_bytes,
    unpack,
)
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.distributed.mesh import shares


@dataclass(frozen=True)
class _Seen:
    """What each member sees, for one window.

    Attributes:
        runs: all queries over the pages that this rank attends to.
        rows: per member, the rows that see some of the pages it attends to.
        outside_tokens: tokens that this rank reads in place outside the group.
    """

    runs: list[QueryRun]
    rows: list[RowSet]
    outside_tokens: int


class Replicated:
    """`layers.step.SequenceAttention` of one step with replicated tokens."""

    def __init__(self, step: StepState) -> None:
        self._step = step
        self._seen: dict[int | None, _Seen] = {}

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
        seen = self._seen.get(window)
        if seen is None:
            seen = self._seen[window] = self._plan(window)
        step.count_in_place(seen.outside_tokens)
        pool = step.context.pages(layer)
        partial = step.context.backend.partial(q_THD, seen.runs, pool, scale=scale, window=window)
        return self._share_heads(partial.o, partial.lse, q_THD.dtype, seen)

    def _share_heads(
        self, o_THD: Tensor, lse_TH: Tensor, dtype: torch.dtype, seen: _Seen
    ) -> Tensor:
        """Give every member its heads of this rank's partials; merge those of this rank's heads."""
        step, me = self._step, self._step.me
        dim = o_THD.shape[2]
        heads = shares(o_THD.shape[1], step.size)
        begin, end = heads[me]
        nothing = o_THD.new_empty(0, dtype=torch.uint8)
        seen_o, seen_lse = seen.rows[me].take(o_THD), seen.rows[me].take(lse_TH)
        send = [
            nothing if member == me else pack(seen_o[:, first:last], seen_lse[:, first:last], dtype)
            for member, (first, last) in enumerate(heads)
        ]
        recv = [
            nothing.new_empty(
                0 if member == me else packed_bytes(rows.count, end - begin, dim, dtype)
            )
            for member, rows in enumerate(seen.rows)
        ]
        step.communicate(send, recv)
        home = [
            (rows, unpack(message, rows.count, end - begin, dim, dtype))
            for member, (rows, message) in enumerate(zip(seen.rows, recv, strict=True))
            if member != me and rows.count
        ]
        out = o_THD.new_zeros(o_THD.shape, dtype=dtype)
        own = Partial(o_THD[:, begin:end], lse_TH[:, begin:end])
        merge_home(step.context.backend, own, home, out[:, begin:end])
        return out

    def _plan(self, window: int | None) -> _Seen:
        step, layout = self._step, self._step.layout
        owners = layout.pages.owners
        runs = layout.runs(step.me)
        need = needed(layout, runs, window)
        if (need & ~np.isin(owners, layout.group) & ~step.readable()).any():
            raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")
        reader = np.array(
            [
                layout.group.index(sp_rank) if sp_rank in layout.group else sp_rank % step.size
                for sp_rank in range(step.context.mesh.sp_size)
            ]
        )[owners]
        indices = [np.flatnonzero(reader == member) for member in range(step.size)]
        pieces = [cut_pieces(layout, runs, index, window) for index in indices]
        outside = need & (reader == step.me) & (owners != step.context.mesh.sp_rank)
        return _Seen(
            runs=query_runs(layout, pieces[step.me], indices[step.me]),
            rows=[RowSet(piece.rows(), layout.rows[step.me]) for piece in pieces],
            outside_tokens=int(layout.pages.tokens[outside].sum()),
        )

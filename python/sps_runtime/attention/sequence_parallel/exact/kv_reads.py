"""Queries that stay while K and V come to them: in place where the owner's pool can be read from
here, else by transfer. What pass-KV and Ulysses have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend, PagePool, Partial, QueryRun
from sps_runtime.attention.page_reads import cut_pieces, needed, query_runs
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints, Runs
from sps_runtime.kvstore.transfer import Shipment, Staging
from sps_runtime.ops.merge_state import merge_state


@dataclass(frozen=True)
class HeadShare:
    """Query heads that one member computes, and the KV heads they read.

    Attributes:
        q: (begin, end) of the TP slice's query heads.
        kv: (begin, end) of the KV heads that these read.
        segments: ((q begin, q end), (kv begin, kv end)): the share cut so that within a segment
            query heads divide evenly over KV heads, as a backend wants it.
    """

    q: tuple[int, int]
    kv: tuple[int, int]
    segments: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    @classmethod
    def of(cls, begin: int, end: int, group: int) -> HeadShare:
        """Query heads [begin, end) where `group` of them share a KV head."""
        if begin == end:
            return cls((begin, end), (0, 0), ())
        first, last = begin // group, -(-end // group)
        whole = (-(-begin // group), end // group)
        if whole[0] > whole[1]:  # within one KV head
            return cls((begin, end), (first, last), (((begin, end), (first, last)),))
        cuts = [
            ((begin, whole[0] * group), (first, whole[0])),
            ((whole[0] * group, whole[1] * group), whole),
            ((whole[1] * group, end), (whole[1], last)),
        ]
        return cls((begin, end), (first, last), tuple(c for c in cuts if c[0][0] < c[0][1]))


def share_partial(
    backend: AttentionBackend,
    q_THD: Tensor,
    runs: Sequence[QueryRun],
    pool: PagePool,
    share: HeadShare,
    first_kv: int,
    scale: float,
    window: int | None,
) -> Partial:
    """The partial of a member's heads.

    Args:
        q_THD: the heads of `share`.
        first_kv: the pool's first KV head, among the TP slice's.
    """
    if len(share.segments) == 1:
        kv = share.segments[0][1]
        return backend.partial(
            q_THD,
            runs,
            pool,
            scale=scale,
            window=window,
            kv_heads=(kv[0] - first_kv, kv[1] - first_kv),
        )
    o = q_THD.new_zeros(q_THD.shape, dtype=torch.float32)
    lse = q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32)
    for (begin, end), kv in share.segments:
        heads = slice(begin - share.q[0], end - share.q[0])
        part = backend.partial(
            q_THD[:, heads].contiguous(),
            runs,
            pool,
            scale=scale,
            window=window,
            kv_heads=(kv[0] - first_kv, kv[1] - first_kv),
        )
        o[:, heads], lse[:, heads] = part.o, part.lse
    return Partial(o, lse)


class KVReads:
    """Which pages each member's queries read in a step, and how they get there.

    Args:
        step: the step on this rank.
        readers: each member's queries.
        window: of the layers this is for.

    Raises:
        ValueError: a page lies neither in the group nor on this host.
    """

    def __init__(self, step: StepState, readers: Sequence[Runs], window: int | None) -> None:
        self._step = step
        layout, me = step.layout, step.me
        owners = layout.pages.owners
        readable = step.readable()
        need = needed(layout, readers[me], window)
        self.in_place = self._runs(readers[me], np.flatnonzero(readable), window)
        mine = owners == step.context.mesh.sp_rank
        self._remote_tokens = int(layout.pages.tokens[need & readable & ~mine].sum())
        self._waits = step.neighbours(need)
        self._incoming: Staging | None = None
        self._outgoing: list[Shipment] = []
        self.staged: list[QueryRun] = []
        if step.crosses_hosts:
            self._plan_transfer(readers, window)
        elif (need & ~readable).any():
            raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        shares: Sequence[HeadShare],
        *,
        scale: float,
        window: int | None,
    ) -> Partial:
        """This member's queries over all the pages they see. A collective call where members lie
        on several hosts: pages are on their way while those that are here are attended to.

        Args:
            q_THD: this rank's queries, the heads of its share.
            shares: each member's heads.
        """
        step = self._step
        share = shares[step.me]
        arriving = self._start(layer, shares) if self._incoming is not None else None
        step.wait(layer, self._waits)
        heads = share.kv[1] - share.kv[0]
        shape = step.context.store.shape
        step.context.traffic.attention_bytes += (
            self._remote_tokens * shape.token_bytes * heads // shape.kv_heads
        )
        pool, backend = step.context.pages(layer), step.context.backend
        partial = share_partial(backend, q_THD, self.in_place, pool, share, 0, scale, window)
        if arriving is None:
            return partial
        staged = arriving()
        if not self.staged:
            return partial
        other = share_partial(
            backend, q_THD, self.staged, staged, share, share.kv[0], scale, window
        )
        return Partial(*merge_state(partial.o, partial.lse, other.o, other.lse))

    def _plan_transfer(self, readers: Sequence[Runs], window: int | None) -> None:
        step, layout = self._step, self._step.layout
        need = [needed(layout, runs, window) for runs in readers]
        sources = [self._index(need[step.me], owner, step.me) for owner in range(step.size)]
        reached = np.isin(layout.pages.owners, layout.group)
        reached |= step.readable()
        if (need[step.me] & ~reached).any():
            raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")
        self._incoming = Staging([step.shipment(index) for index in sources])
        self._outgoing = [
            step.shipment(self._index(need[reader], step.me, reader)) for reader in range(step.size)
        ]
        index = np.concatenate(sources)
        ids = np.concatenate([self._incoming.page_ids(m) for m in range(step.size)])
        order = np.argsort(index)
        self.staged = self._runs(readers[step.me], index[order], window, ids[order])

    def _index(self, need: np.ndarray, owner: int, reader: int) -> Ints:
        """Places in the page table of what an owner must send a reader."""
        step = self._step
        if step.same_host(owner, reader):
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(need & (step.layout.pages.owners == step.layout.group[owner]))

    def _runs(
        self, runs: Runs, index: Ints, window: int | None, ids: np.ndarray | None = None
    ) -> list[QueryRun]:
        layout = self._step.layout
        return query_runs(layout, cut_pieces(layout, runs, index, window), index, page_ids=ids)

    def _start(self, layer: int, shares: Sequence[HeadShare]) -> Callable[[], PagePool]:
        """Begin to send and receive pages; the result waits for them."""
        step, staging = self._step, self._incoming
        assert staging is not None
        own = step.context.store.own
        k, v = own.k[layer], own.v[layer]
        send = [
            shipment.pack(k, v, share.kv)
            for shipment, share in zip(self._outgoing, shares, strict=True)
        ]
        begin, end = shares[step.me].kv
        staged, recv = staging.allocate(k, end - begin)
        pending = step.start(send, recv)

        def arrive() -> PagePool:
            step.context.traffic.exposed_s += pending.wait()
            staged_k, staged_v = staging.settle(staged)
            return PagePool([staged_k], [staged_v], staging.slots)

        return arrive

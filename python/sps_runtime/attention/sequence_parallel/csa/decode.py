"""Sparse decode: owners judge their own pages, all agree on one choice, and read what is theirs.

A generated token is a query block of one row: its own block's pages are read whole, those before
compete. Every rank of the group has the query and estimates the mass of its own pages; the sums of
masses, then the shares of pages are told to all (4 bytes a page and KV head), so that all
make the same choice (`sparse.selection.select`), and each attends to what it owns of it. KV never
moves, as in exact decode. Committed pages on a rank outside of the group are dealt to members.

Where every page's summary can be read in place and a kernel scores it (one host), each rank scores
all of them, which is sooner than telling: shares are the same bit by bit on every rank.

A token at a superblock's first position is left to exact attention (`shard_layout`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, Partial, QueryRun
from sps_runtime.attention.sequence_parallel.csa.last_rows import LastRows
from sps_runtime.attention.sequence_parallel.exact.decode_exchange import bring_home, gather_queries
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.ops.merge_state import merge_state
from sps_runtime.sparse.operators import Chosen, QueryBlocks
from sps_runtime.sparse.selection import select
from sps_runtime.sparse.torch_operators import selection_settings
from sps_runtime.types.attention import SparseCounters, SparseSettings


class SparseDecode:
    """Attention of sequences of one new token each, all with the same settings.

    Raises:
        ValueError: pages have no summaries, or cannot be reached.
    """

    def __init__(self, step: StepState, settings: SparseSettings) -> None:
        layout, context = step.layout, step.context
        if context.sparse is None:
            raise ValueError(f"epoch {layout.epoch} is sparse where pages have no summaries")
        self._step, self._settings = step, settings
        self._operators, self._summaries = context.sparse.operators, context.sparse.store
        size = max(settings.block, layout.page_size)
        self._first = layout.pages.first[:-1]
        self._before = layout.starts // size * size // layout.page_size
        self._reader = _readers(step)
        if not (step.readable() | (self._reader != step.me)).all():
            raise ValueError(f"epoch {layout.epoch} reads pages that this rank cannot reach")
        self._mine = [self._places(t, step.me) for t in range(len(self._first))]
        last = layout.pages.first[1:] - 1
        full = (layout.lengths % layout.page_size == 0) & (
            layout.pages.owners[last] == context.mesh.sp_rank
        )
        slots = layout.pages.ids[last[full]] % context.store.shape.slots
        self._filled = torch.from_numpy(slots)
        self._shared = LastRows(step, settings) if step.readable().all() else None
        inside = np.zeros(len(layout.pages.ids), dtype=np.bool_)
        for begin, stop in zip(self._first + self._before, layout.pages.first[1:], strict=True):
            inside[begin:stop] = True
        self._waits = step.neighbours(inside) if self._shared is not None else ()
        at = np.arange(len(self._first))
        fields = (at, np.ones_like(at), layout.starts, at, self._first, layout.lengths)
        table = torch.from_numpy(np.stack(fields, axis=1).astype(np.int32))
        ends = self._first + self._before
        spans = [np.arange(*span) for span in zip(self._first, ends, strict=True)]
        self._all: Ints = np.concatenate(spans)
        self._tokens = QueryBlocks(table, torch.tensor(layout.pages.ids), len(at))

    def counters(self) -> tuple[SparseCounters, ...]:
        """Nothing: what a prompt's attention did is told, not what single tokens do."""
        return ()

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write new KV, and summarise pages that it fills."""
        self._step.write(layer, k_TKD, v_TKD)
        if len(self._filled):
            own = self._step.context.store.own
            self._operators.summarise(
                own.k[layer], own.v[layer], self._filled, self._summaries.own[layer]
            )

    def publish(self, layer: int) -> None:
        """Others of the step may wait for this rank's KV."""
        self._step.publish(layer)

    def attend(
        self, layer: int, q_THD: Tensor, kv_heads: int, *, scale: float, window: int | None
    ) -> Tensor:
        """Attention once the step's KV of this layer is written; a collective call."""
        q = gather_queries(self._step, q_THD)
        if window is not None:
            runs = [
                self._run(t, np.concatenate((self._mine[t], self._own(t)))) for t in range(len(q))
            ]
            pool = self._step.context.pages(layer)
            backend = self._step.context.backend
            return bring_home(
                self._step, backend.partial(q, runs, pool, scale=scale, window=window), q_THD
            )
        chosen = self._choose(layer, q, kv_heads, scale)
        return bring_home(self._step, self._attend(layer, q, chosen, scale), q_THD)

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
        self.write(layer, k_TKD, v_TKD)
        self.publish(layer)
        return self.attend(layer, q_THD, k_TKD.shape[1], scale=scale, window=window)

    # ------------------------------------------------------------------------------- the choice

    def _choose(self, layer: int, q_THD: Tensor, kv_heads: int, scale: float) -> Chosen:
        """What this rank reads of the choice that all make."""
        context = self._step.context
        pool, summaries = context.pages(layer), context.summaries(layer)
        if self._shared is not None:
            self._step.wait(layer, self._waits)
            known = self._operators.choose_for_last_rows(
                self._shared.of(q_THD),
                self._shared.queries,
                pool.k,
                summaries,
                self._settings,
                scale,
            )
            if known is not None:
                return self._shared.part(known)
            self._shared = None
        return self._lists(self._told(layer, q_THD, kv_heads, scale))

    def _told(self, layer: int, q_THD: Tensor, kv_heads: int, scale: float) -> list[Tensor]:
        """bool ``[kv_heads, pages before the block]`` for each sequence: the same on every rank."""
        context = self._step.context
        pool, summaries = context.pages(layer), context.summaries(layer)
        own = [self._run(t, self._own(t)) for t in range(len(q_THD))]
        total_TH = context.backend.partial(q_THD, own, pool, scale=scale).lse
        masses = []
        for t, places in enumerate(self._mine):
            ids = torch.from_numpy(self._step.layout.pages.ids[places])
            mass_HN = self._operators.masses(
                q_THD[t], ids, pool.k, summaries, self._settings, scale
            )
            masses.append(mass_HN)
            total_TH[t] = torch.logaddexp(total_TH[t], mass_HN.logsumexp(-1))
        total_TH = torch.stack(self._tell(total_TH)).logsumexp(0)
        shares = [
            (mass_HN - total_TH[t, :, None]).exp().unflatten(0, (kv_heads, -1)).norm(dim=1)
            for t, mass_HN in enumerate(masses)
        ]
        settings, size = self._settings, self._step.layout.page_size
        chosen = []
        for t, share_KN in enumerate(self._everyones(shares, kv_heads)):
            setting = selection_settings(settings, int(self._step.layout.starts[t]), size, 1)
            chosen.append(select(share_KN, setting.block // size, setting))
        return chosen

    def _tell(self, x: Tensor) -> list[Tensor]:
        """Every member's tensor of this shape."""
        if self._step.size == 1:
            return [x]
        found = [torch.empty_like(x) for _ in range(self._step.size)]
        self._step.communicate([x] * self._step.size, found)
        return found

    def _everyones(self, shares: Sequence[Tensor], kv_heads: int) -> list[Tensor]:
        """All pages' shares from each member's own."""
        step = self._step
        whole = [torch.zeros(kv_heads, int(before)) for before in self._before]
        flat = torch.cat([torch.empty(0), *(share.reshape(-1) for share in shares)])
        places = [[self._places(t, m) for t in range(len(whole))] for m in range(step.size)]
        found = [flat.new_empty(kv_heads * sum(map(len, each))) for each in places]
        if step.size == 1:
            found = [flat]
        else:
            step.communicate([flat] * step.size, found)
        for each, message in zip(places, found, strict=True):
            parts = message.split([kv_heads * len(at) for at in each])
            for t, (at, part) in enumerate(zip(each, parts, strict=True)):
                whole[t][:, torch.from_numpy(at - self._first[t])] = part.view(kv_heads, -1)
        return whole

    # ---------------------------------------------------------------------------- what is chosen

    def _attend(self, layer: int, q_THD: Tensor, chosen: Chosen, scale: float) -> Partial:
        """This rank's part of what was chosen, and of what stands for the rest."""
        context = self._step.context
        lists = PageLists(chosen.items, chosen.page_ids, chosen.page_positions, complete=True)
        partial = context.backend.partial_lists(q_THD, lists, context.pages(layer), scale=scale)
        self._count(chosen.page_ids)
        if self._settings.tail == "none" or not len(chosen.dropped_ids):
            return partial
        summaries = context.summaries(layer)
        o, lse = self._operators.tail(q_THD, self._tokens, chosen, summaries, scale)
        return Partial(*merge_state(partial.o, partial.lse, o, lse))

    def _lists(self, kept: Sequence[Tensor]) -> Chosen:
        """Items over this rank's pages, those chosen and those dropped."""
        layout = self._step.layout
        items, dropped = [], []
        entries: list[Ints] = []
        gone: list[Ints] = []
        read = lost = 0
        for t, kept_KN in enumerate(kept):
            mine, own = self._mine[t], self._own(t)
            start, length = int(layout.starts[t]), int(layout.lengths[t])
            for head, keep in enumerate(kept_KN.numpy()[:, mine - self._first[t]]):
                at, out = np.concatenate((mine[keep], own)), mine[~keep]
                items.append((t, 1, start, read, len(at), length, head, 1))
                dropped.append((lost, len(out)))
                entries.append(at)
                gone.append(out)
                read, lost = read + len(at), lost + len(out)
        pages, reads = layout.pages, np.concatenate(entries)
        return Chosen(
            torch.tensor(items, dtype=torch.int32).reshape(-1, 8),
            torch.tensor(pages.ids[reads]),
            torch.tensor(pages.positions[reads]),
            torch.tensor(dropped, dtype=torch.int32).reshape(-1, 2),
            torch.tensor(pages.ids[np.concatenate(gone)]),
            read_pairs=read,
            causal_pairs=read + lost,
        )

    def _count(self, ids: Tensor) -> None:
        """Bytes read in place outside of the group: pages of a KV head, and all summaries."""
        step, shape = self._step, self._step.context.store.shape
        remote = step.layout.pages.owners != step.context.mesh.sp_rank
        read = int((ids.numpy() // shape.slots != step.context.mesh.sp_rank).sum())
        judged = int(remote[self._judged].sum()) * shape.kv_heads
        page = shape.token_bytes * shape.page_size // shape.kv_heads
        step.context.traffic.attention_bytes += read * page + judged * self._summaries.nbytes

    # -------------------------------------------------------------------------------- whose pages

    @property
    def _judged(self) -> Ints:
        """Places in the layout's table of the pages that this rank judges."""
        if self._shared is None:
            return np.concatenate(self._mine)
        return self._all

    def _places(self, t: int, member: int) -> Ints:
        """Places in the layout's table of a member's pages before a sequence's block."""
        first, stop = self._first[t], self._first[t] + self._before[t]
        places: Ints = first + np.flatnonzero(self._reader[first:stop] == member)
        return places

    def _own(self, t: int) -> Ints:
        """The same of this rank's pages of the block itself."""
        first, stop = self._first[t] + self._before[t], self._step.layout.pages.first[t + 1]
        places: Ints = first + np.flatnonzero(self._reader[first:stop] == self._step.me)
        return places

    def _run(self, t: int, places: Ints) -> QueryRun:
        """A sequence's row over pages."""
        layout = self._step.layout
        ids = torch.from_numpy(layout.pages.ids[places])
        positions = torch.from_numpy(layout.pages.positions[places])
        return QueryRun(t, 1, int(layout.starts[t]), ids, positions, int(layout.lengths[t]))


def _readers(step: StepState) -> Ints:
    """The member that reads each page: its owner, or one for pages outside of the group."""
    group = step.layout.group
    members = [
        group.index(rank) if rank in group else rank % step.size
        for rank in range(step.context.mesh.sp_size)
    ]
    readers: Ints = np.array(members)[step.layout.pages.owners]
    return readers

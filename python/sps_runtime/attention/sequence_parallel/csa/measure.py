"""What sparse attention dropped, on a sample of query blocks: told, and not acted on.

Rows of sampled blocks keep their queries and the weight of what they read. After the last layer the
queries travel to the ranks that own pages before them, and weights over those come back: routing a
few rows costs far less than fetching what they dropped. One exchange each way a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import QueryRun
from sps_runtime.attention.sequence_parallel.csa.counts import SparseCounts
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.sparse_blocks import SparseBlocks
from sps_runtime.attention.sparse_samples import Sample, samples

Tensors = list[Tensor]
"""For each sample ``[rows, query heads of the KV head, ...]``."""


class SparseMeasure:
    """The samples of one step, on one rank. Every rank of the group calls `begin_layer` for each
    layer that is sparse, and `finish` once.

    Args:
        found: the sparse blocks of each member.
    """

    def __init__(
        self, step: StepState, counts: SparseCounts, found: Sequence[Sequence[SparseBlocks]]
    ) -> None:
        self._step, self._counts = step, counts
        shape, mesh = step.context.store.shape, step.context.mesh
        self._first_head = mesh.tp_rank * shape.kv_heads
        heads = range(self._first_head, self._first_head + shape.kv_heads)
        self._samples = [samples(step.layout, each, shape.layers, heads) for each in found]
        owners = step.layout.pages.owners
        self._owned = [np.flatnonzero(owners == rank) for rank in step.layout.group]
        self._outside = np.flatnonzero(~np.isin(owners, step.layout.group))
        self._layers: set[int] = set()
        self._kept: dict[Sample, tuple[Tensor, Tensor]] = {}
        self._like, self._scale = torch.empty(0), 1.0

    def begin_layer(self, layer: int, q_THD: Tensor, scale: float) -> None:
        """This layer's samples are measured."""
        self._layers.add(layer)
        group = q_THD.shape[1] // self._step.context.store.shape.kv_heads
        self._like, self._scale = q_THD.new_empty(0, group, q_THD.shape[2]), scale

    def keep(
        self,
        layer: int,
        blocks: SparseBlocks,
        q_THD: Tensor,
        kept_lse_TH: Tensor,
        first_row: int = 0,
    ) -> None:
        """Remember queries, and weights of what they read, of the layer's sampled rows.

        Args:
            q_THD, kept_lse_TH: of the step's rows from `first_row` on.
        """
        group = q_THD.shape[1] // self._step.context.store.shape.kv_heads
        for sample in self._samples[self._step.me]:
            here = 0 <= sample.row - first_row < len(q_THD)
            if here and sample.layer == layer and sample.settings == blocks.settings:
                heads = slice(sample.head * group, (sample.head + 1) * group)
                rows = torch.tensor(sample.row - first_row) + torch.tensor(sample.offsets)
                self._kept[sample] = (q_THD[rows, heads], kept_lse_TH[rows, heads])

    def finish(self) -> None:
        """Measure what was kept, and count it; a collective call, once a step."""
        step = self._step
        asked = [[s for s in each if s.layer in self._layers] for each in self._samples]
        mine = asked[step.me]
        lse = self._own_weights(mine)
        if step.size > 1 and any(asked):
            self._ask_owners(asked, lse)
        for sample, all_lse in zip(mine, lse, strict=True):
            dropped = (1 - torch.exp(self._kept[sample][1] - all_lse)).clamp(0.0, 1.0)
            self._counts.record(
                sample.sequence,
                sample.layer,
                self._first_head + sample.head,
                sample.position,
                float(dropped.mean()),
                float(dropped.max()),
            )
        self._kept.clear()

    def _own_weights(self, mine: Sequence[Sample]) -> Tensors:
        """lse of each sample's rows over this rank's pages, and those outside of the group."""
        read: dict[tuple[int, int, int], int] = defaultdict(int)
        for sample in mine:
            begin, end = np.searchsorted(self._outside, sample.pages[:2]).tolist()
            where = (sample.layer, sample.head, sample.sequence)
            # Those of an earlier block are among them.
            read[where] = max(read[where], end - begin)
        for (_, _, sequence), pages in read.items():
            self._counts.read_in_place(sequence, pages)
        queries = [self._kept[sample][0] for sample in mine]
        here = np.union1d(self._owned[self._step.me], self._outside)
        return self._weigh(mine, queries, here, own=True)

    def _ask_owners(self, asked: Sequence[Sequence[Sample]], lse: Tensors) -> None:
        """Add what other members own to `lse`, in place."""
        me, mine = self._step.me, asked[self._step.me]
        others = [member for member in range(self._step.size) if member != me]
        guests = {m: [s for s in asked[m] if self._owns(me, s)] for m in others}
        sent = {m: [i for i, s in enumerate(mine) if self._owns(m, s)] for m in others}
        queries = [self._kept[sample][0] for sample in mine]
        came = self._swap({m: [queries[i] for i in sent[m]] for m in others}, guests, self._like)
        owned = self._owned[me]
        answers = {m: self._weigh(guests[m], came[m], owned, own=False) for m in others}
        asking = {m: [mine[i] for i in sent[m]] for m in others}
        back = self._swap(answers, asking, self._like[:, :, 0].float())
        for m in others:
            for i, part in zip(sent[m], back[m], strict=True):
                lse[i] = torch.logaddexp(lse[i], part)
                self._counts.route(mine[i].sequence, queries[i].nbytes + part.nbytes)

    def _swap(
        self, send: dict[int, Tensors], expected: dict[int, list[Sample]], like: Tensor
    ) -> dict[int, Tensors]:
        """Exchange what is ``[rows, ...]`` of each sample; `like` has no rows."""
        nothing, each = like.reshape(-1), like.shape[1:].numel()
        rows = {m: [len(sample.offsets) for sample in found] for m, found in expected.items()}
        out, recv = [nothing] * self._step.size, [nothing] * self._step.size
        for m, parts in send.items():
            out[m] = torch.cat([nothing, *(part.reshape(-1) for part in parts)])
            recv[m] = nothing.new_empty(sum(rows[m]) * each)
        self._step.communicate(out, recv)
        shape = like.shape[1:]
        return {m: list(recv[m].view(-1, *shape).split(rows[m])) if rows[m] else [] for m in rows}

    def _weigh(
        self, found: Sequence[Sample], queries: Tensors, places: Ints, *, own: bool
    ) -> Tensors:
        """lse of each sample's rows over the pages before its block at `places` of the layout's
        table, and with `own` over the block's own."""
        by_head: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, sample in enumerate(found):
            by_head[sample.layer, sample.head].append(index)
        lse: Tensors = [torch.empty(0)] * len(found)
        for (layer, head), indices in by_head.items():
            q = torch.cat([queries[index] for index in indices])
            taken = [found[index] for index in indices]
            total = self._partial_lse(layer, head, q, self._before(taken, places))
            if own:
                inside = self._partial_lse(layer, head, q, self._inside(taken))
                total = torch.logaddexp(total, inside)
            parts = total.split([len(queries[index]) for index in indices])
            for index, part in zip(indices, parts, strict=True):
                lse[index] = part
        return lse

    def _partial_lse(
        self, layer: int, head: int, q_RGD: Tensor, runs: Sequence[QueryRun]
    ) -> Tensor:
        context = self._step.context
        return context.backend.partial(
            q_RGD, runs, context.pages(layer), scale=self._scale, kv_heads=(head, head + 1)
        ).lse

    def _before(self, found: Sequence[Sample], places: Ints) -> list[QueryRun]:
        """Samples' rows, end to end, over pages before their blocks, which they see whole."""
        runs, row = [], 0
        for sample in found:
            begin, before, _ = sample.pages
            at = places[np.searchsorted(places, begin) : np.searchsorted(places, before)]
            if len(at):
                runs.append(self._run(sample, row, len(sample.offsets), 0, at))
            row += len(sample.offsets)
        return runs

    def _inside(self, found: Sequence[Sample]) -> list[QueryRun]:
        """Samples' rows, end to end, each over its block's own pages."""
        runs: list[QueryRun] = []
        for sample in found:
            own = np.arange(*sample.pages[1:])
            for offset in sample.offsets:
                runs.append(self._run(sample, len(runs), 1, offset, own))
        return runs

    def _run(self, sample: Sample, row: int, rows: int, offset: int, at: Ints) -> QueryRun:
        pages = self._step.layout.pages
        ids, positions = torch.from_numpy(pages.ids[at]), torch.from_numpy(pages.positions[at])
        return QueryRun(row, rows, sample.position + offset, ids, positions, sample.kv_len)

    def _owns(self, member: int, sample: Sample) -> bool:
        """Whether a member has pages before a sample's block."""
        places = self._owned[member]
        first = np.searchsorted(places, sample.pages[0])
        return bool(first < len(places) and places[first] < sample.pages[1])

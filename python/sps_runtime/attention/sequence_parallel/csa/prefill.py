"""Block-sparse pass-KV: query blocks choose pages by their summaries, and read those alone.

A page is summarised when it has been written, behind the same fence as its keys; each query block
then chooses among the pages before it (`sparse.operators`), attends to them where they lie, or
where they came from another host (`far_pages`), and lets means stand for the others. In the same
step other sequences read all their pages (`exact.kv_reads`), and so do layers with a window. ADR 9
has the method and its figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.page_reads import needed
from sps_runtime.attention.sequence_parallel.csa.bound import hold
from sps_runtime.attention.sequence_parallel.csa.counts import SparseCounts
from sps_runtime.attention.sequence_parallel.csa.far_pages import FarExchange, FarPages
from sps_runtime.attention.sequence_parallel.csa.far_weights import FarWeights
from sps_runtime.attention.sequence_parallel.csa.measure import SparseMeasure
from sps_runtime.attention.sequence_parallel.csa.new_summaries import NewSummaries
from sps_runtime.attention.sequence_parallel.csa.rows import SparseRows
from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare, KVReads
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_audit import held_pages, reads_everything
from sps_runtime.attention.sparse_blocks import (
    Mask,
    alone_pages,
    sparse_blocks,
    split_runs,
)
from sps_runtime.types.attention import SparseCounters


class SparsePassKV:
    """`layers.step.SequenceAttention` of a step in which some sequences choose their pages.

    Raises:
        ValueError: the plan cuts a superblock, reads a page that cannot be read from here, or pages
            have no summaries.
    """

    def __init__(self, step: StepState) -> None:
        self._step = step
        layout = step.layout
        self._new_summaries = NewSummaries(step)
        self._operators = self._new_summaries.operators
        split = [split_runs(layout, member) for member in range(step.size)]
        self._exact = [exact for _, exact in split]
        found = [sparse_blocks(layout, sparse) for sparse, _ in split]
        self._blocks = found[step.me]
        seen = [needed(layout, sparse, None) for sparse, _ in split]
        need = seen[step.me]
        self._far = FarExchange(FarPages(step, seen)) if step.crosses_hosts else None
        if self._far is None and (need & ~step.readable()).any():
            raise ValueError(f"epoch {layout.epoch} chooses among pages that cannot be read")
        self._everything = need[:, None] & ~step.readable()[:, None]
        self._waits = step.neighbours(need)
        self._counts = SparseCounts(step, need, alone_pages(layout, self._exact[step.me]))
        self._measure = SparseMeasure(step, self._counts, found)
        self._weights = FarWeights(step, self._counts, found) if step.crosses_hosts else None
        self._held = held_pages(layout)
        self._reads: dict[int | None, KVReads] = {}

    def counters(self) -> tuple[SparseCounters, ...]:
        """What was read for each sparse sequence of this rank, once all layers have run; a
        collective call."""
        self._measure.finish()
        return self._counts.of_sequences()

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
        if window is None:
            self._new_summaries.write(layer)
        if step.size > 1:
            step.publish(layer)
        partials = self._exact_rows(layer, q_THD, k_TKD.shape[1], scale, window)
        if window is None:
            step.wait(layer, self._waits)
            self._counts.begin_layer()
            self._measure.begin_layer(layer, q_THD, scale)
            partials += self._sparse_rows(layer, q_THD, scale)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        if len(out_THD):
            step.context.backend.merge(partials, out_THD)
        return out_THD

    def _sparse_rows(self, layer: int, q_THD: Tensor, scale: float) -> list[Partial]:
        """What rows that choose have read; a collective call between hosts."""
        if self._far is not None:
            self._far.begin(layer)
        means = self._step, self._operators, self._counts, self._measure
        parts = [SparseRows(*means, layer, q_THD, blocks, scale) for blocks in self._blocks]
        if self._weights is not None:
            self._weights.send(parts, q_THD)
        if self._far is not None:
            self._fetch(layer, self._chosen(parts), np.ones_like(self._held))
        pool = self._step.context.pages(layer) if self._far is None else self._far.pool
        for part in parts:
            part.attend(pool)
        if self._weights is not None:
            self._weights.add(layer, parts, scale)
        self._hold(layer, parts)
        return [partial for part in parts for partial in part.partials()]

    def _chosen(self, parts: Sequence[SparseRows]) -> Mask:
        """What the rows choose; where keys themselves are asked, all that they may see."""
        wanted = self._nothing()
        if any(reads_everything(blocks.settings) for blocks in self._blocks):
            wanted |= self._everything
        else:
            for part in parts:
                wanted |= part.choose()
        return wanted

    def _hold(self, layer: int, parts: Sequence[SparseRows]) -> None:
        """Where something is bounded, widen what loses too much; a collective call between hosts,
        for as many times as all members know."""

        def bring(wanted: Mask) -> None:
            if self._held.any():
                self._fetch(layer, wanted, self._held)

        bounds = [part.bound for part in parts if part.bound is not None]
        hold(bounds, self._nothing(), bring)

    def _fetch(self, layer: int, wanted: Mask, of: Mask) -> None:
        """Bring what is wanted of some pages from other hosts."""
        if self._far is not None:
            for places in self._far.fetch(layer, wanted, of):
                self._counts.ask(places)

    def _nothing(self) -> Mask:
        kv_heads = self._step.context.store.shape.kv_heads
        return np.zeros((len(self._held), kv_heads), dtype=np.bool_)

    def _exact_rows(
        self, layer: int, q_THD: Tensor, kv_heads: int, scale: float, window: int | None
    ) -> list[Partial]:
        """The partial of rows that read all pages; a collective call between hosts."""
        step, layout = self._step, self._step.layout
        readers = self._exact
        if window is not None:
            readers = [layout.runs(member) for member in range(step.size)]
        if not any(len(runs) for runs in readers):
            return []
        reads = self._reads.get(window)
        if reads is None:
            reads = self._reads[window] = KVReads(step, readers, window)
        heads = q_THD.shape[1]
        shares = [HeadShare.of(0, heads, heads // kv_heads)] * step.size
        partial = reads.attend(layer, q_THD, shares, scale=scale, window=window)
        return [partial] if len(readers[step.me]) else []

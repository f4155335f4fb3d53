"""One layer of some query blocks: choose, attend, measure what was dropped, and hold it to a bound.

Where a request bounds what may be dropped (`max_tau`), each superblock and KV head is measured on
some of its rows. Above the bound its budget is doubled, and if that is not enough it reads all
pages; both are decided by the superblock's own rows, so not by who computes it.
"""

from __future__ import annotations

import msgspec
import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial
from sps_runtime.attention.sequence_parallel.csa.counts import BlockCounts, SparseCounts
from sps_runtime.attention.sequence_parallel.csa.measure import SparseMeasure
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.sparse_audit import Audit, Probe, sample_superblocks
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks, wanted_pages
from sps_runtime.attention.sparse_choice import (
    all_pages,
    page_lists,
    put_items,
    put_partial,
    take_blocks,
    take_items,
)
from sps_runtime.sparse.audit import audit
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SparseOperators
from sps_runtime.types.attention import SparseSettings

Places = list[tuple[Probe, int]]
"""Superblocks and KV heads."""


class SparseRows:
    """The rows of query blocks with the same settings, in one layer.

    Args:
        q_THD: of all the step's rows, or of those from `first_row` on.
    """

    def __init__(
        self,
        step: StepState,
        operators: SparseOperators,
        counts: SparseCounts | BlockCounts,
        measure: SparseMeasure,
        layer: int,
        q_THD: Tensor,
        blocks: SparseBlocks,
        scale: float,
        first_row: int = 0,
    ) -> None:
        context = step.context
        self._step, self._operators = step, operators
        self._counts, self._measure = counts, measure
        self._layer, self._blocks = layer, blocks
        self._q_THD, self._scale = q_THD, scale
        self._pool, self._summaries = context.pages(layer), context.summaries(layer)
        self._kv_heads = context.store.shape.kv_heads
        self._group = q_THD.shape[1] // self._kv_heads
        self._first_row = first_row
        self._choice: tuple[Chosen, Mask] | None = None

    def choose(self) -> Mask:
        """Choose, and say which pages that needs, for each KV head."""
        chosen = self._choose(self._blocks.queries, self._blocks.settings)
        self._choice = chosen, self._wanted(chosen)
        return self._choice[1]

    def read(self, pool: PagePool) -> None:
        """Attend to pages where they lie now."""
        self._pool = pool

    def partials(self) -> list[Partial]:
        """What the rows read, and what stands for the rest; (0, -inf) for all other rows."""
        blocks, settings = self._blocks, self._blocks.settings
        if self._choice is None:
            self.choose()
        assert self._choice is not None
        chosen, wanted = self._choice
        kept = self._attend(page_lists(chosen, blocks.rows == len(self._q_THD)))
        if settings.max_tau < 1:
            chosen, audited = self._hold(chosen, kept)
            wanted = wanted | self._wanted(chosen)
        else:
            audited = np.zeros_like(wanted)
            self._measure.keep(self._layer, blocks, self._q_THD, kept.lse, self._first_row)
        self._counts.add(blocks, chosen, wanted, audited)
        if settings.tail == "mean" and len(chosen.dropped_ids):
            onto = (kept.o, kept.lse)
            self._operators.tail(
                self._q_THD, blocks.queries, chosen, self._summaries, self._scale, onto
            )
        return [kept]

    def _choose(self, queries: QueryBlocks, settings: SparseSettings) -> Chosen:
        return self._operators.choose(
            self._q_THD, queries, self._pool.k, self._summaries, settings, self._scale
        )

    def _wanted(self, chosen: Chosen) -> Mask:
        return wanted_pages(self._step.layout, self._blocks, chosen, self._kv_heads)

    def _attend(self, lists: PageLists) -> Partial:
        backend = self._step.context.backend
        return backend.partial_lists(self._q_THD, lists, self._pool, scale=self._scale)

    def _weigh(self, found: Audit) -> Tensor:
        backend = self._step.context.backend
        return found.weigh(self._q_THD, self._pool, backend, self._scale)

    def _hold(self, chosen: Chosen, kept: Partial) -> tuple[Chosen, Mask]:
        """Measure every superblock, and widen what loses too much; `kept` is changed in place."""
        settings = self._blocks.settings
        found = sample_superblocks(self._step.layout, self._blocks, self._layer, self._kv_heads)
        lse_RH = self._weigh(found)
        places = [(probe, head) for probe in found.probes for head in probe.heads]
        lost = self._above(found, lse_RH, chosen, kept, places)
        if lost:
            double = msgspec.structs.replace(settings, budget=min(1.0, 2 * settings.budget))
            blocks = np.unique(np.concatenate([_blocks(probe) for probe, _ in lost]))
            wider = self._choose(take_blocks(self._blocks.queries, blocks), double)
            chosen = self._replace(chosen, kept, lost, wider, blocks)
            lost = self._above(found, lse_RH, chosen, kept, lost)
        if lost:
            everything = all_pages(self._step.layout, self._blocks, self._kv_heads)
            blocks = np.arange(len(self._blocks.sequences))
            chosen = self._replace(chosen, kept, lost, everything, blocks)
            self._counts.fall_back([probe.sequence for probe, _ in lost])
        for probe, head in places:
            self._record(probe, head, found.dropped(probe, head, lse_RH, kept.lse))
        return chosen, found.pages

    def _above(
        self, found: Audit, lse_RH: Tensor, chosen: Chosen, kept: Partial, places: Places
    ) -> Places:
        """Those that may lose more than allowed, with 95% confidence of the others."""
        dropped = chosen.dropped[:, 1].view(-1, self._kv_heads)
        above = []
        for probe, head in places:
            if not bool(dropped[probe.blocks, head].any()):
                continue
            taus = found.dropped(probe, head, lse_RH, kept.lse).mean(1).tolist()
            if audit(taus).exceeds(self._blocks.settings.max_tau):
                above.append((probe, head))
        return above

    def _replace(
        self, chosen: Chosen, kept: Partial, places: Places, other: Chosen, of: Ints
    ) -> Chosen:
        """Take another choice for some superblocks and heads, and attend to that.

        Args:
            of: the blocks that `other` is for.
        """
        items = np.concatenate([_blocks(probe) * self._kv_heads + head for probe, head in places])
        at = np.searchsorted(of, items // self._kv_heads)
        chosen = put_items(chosen, items, other, at * self._kv_heads + items % self._kv_heads)
        lists = take_items(chosen, items)
        put_partial(kept, lists, self._attend(lists), self._group)
        return chosen

    def _record(self, probe: Probe, head: int, dropped: Tensor) -> None:
        first_head = self._step.context.mesh.tp_rank * self._kv_heads
        mean, most = float(dropped.mean()), float(dropped.max())
        self._counts.record(
            probe.sequence, self._layer, first_head + head, probe.position, mean, most
        )


def _blocks(probe: Probe) -> Ints:
    return np.arange(probe.blocks.start, probe.blocks.stop)

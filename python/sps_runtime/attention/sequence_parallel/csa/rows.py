"""One layer of some query blocks: choose, attend, measure what was dropped, hold it to a bound."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import PagePool, Partial
from sps_runtime.attention.sequence_parallel.csa.bound import Bound
from sps_runtime.attention.sequence_parallel.csa.counts import BlockCounts, SparseCounts
from sps_runtime.attention.sequence_parallel.csa.measure import SparseMeasure
from sps_runtime.attention.sequence_parallel.csa.reading import Reading
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_audit import Audit, asks_owners, sample_superblocks
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks
from sps_runtime.attention.sparse_choice import page_lists
from sps_runtime.sparse.operators import Chosen, SparseOperators


class SparseRows:
    """The rows of query blocks with the same settings, in one layer: `choose`, `attend`, for those
    that are bounded `csa.bound.hold`, then `partials`.

    Args:
        q_THD: of all the step's rows, or of those from `first_row` on.

    Attributes:
        audit: the rows that are measured because the settings bound what is dropped.
        bound: what holds them to it, once they have attended.
        asks_owners: pages of other hosts are weighed there, unless they are all fetched.
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
        pool = step.context.pages(layer)
        self._reading = Reading(step, operators, layer, q_THD, blocks, scale, pool)
        self._counts, self._measure = counts, measure
        self._first_row = first_row
        self._choice: tuple[Chosen, Mask] | None = None
        self._kept: Partial | None = None
        self.asks_owners = asks_owners(blocks.settings)
        self.audit = self._sample() if blocks.settings.max_tau < 1 else None
        self.bound: Bound | None = None

    def audited_queries(self) -> Tensor:
        """Those of the audited rows that owners on other hosts are asked about, ``[rows, heads,
        dim]``."""
        q_THD = self._reading.q_THD
        return q_THD[self.audit.rows] if self.audit is not None and self.asks_owners else q_THD[:0]

    def choose(self) -> Mask:
        """Choose, and say which pages that needs, for each KV head."""
        blocks = self._reading.blocks
        chosen = self._reading.choose(blocks.queries, blocks.settings)
        self._choice = chosen, self._reading.wanted(chosen)
        return self._choice[1]

    def attend(self, pool: PagePool) -> None:
        """Attend to what is chosen.

        Args:
            pool: where pages lie now.
        """
        reading = self._reading
        reading.pool = pool
        if self._choice is None:
            self.choose()
        assert self._choice is not None
        chosen, _ = self._choice
        complete = reading.blocks.rows == len(reading.q_THD)
        self._kept = reading.attend(page_lists(chosen, complete))
        if self.audit is not None:
            self.bound = Bound(reading, self.audit, self._counts, self._choice, self._kept)
        else:
            lse_TH = self._kept.lse
            first_row = self._first_row
            self._measure.keep(reading.layer, reading.blocks, reading.q_THD, lse_TH, first_row)

    def partials(self) -> list[Partial]:
        """What the rows read, and what stands for the rest; (0, -inf) for all other rows."""
        assert self._choice is not None and self._kept is not None
        (chosen, wanted), read = self._choice, self._choice[1]
        if self.bound is not None and self.audit is not None:
            chosen, wanted = self.bound.chosen, self.bound.wanted
            read = wanted | self.audit.pages
        blocks = self._reading.blocks
        self._counts.add(blocks, chosen, wanted, read)
        if blocks.settings.tail == "mean" and len(chosen.dropped_ids):
            self._reading.tail(chosen, self._kept)
        return [self._kept]

    def _sample(self) -> Audit:
        reading = self._reading
        here = reading.step.readable()
        if not self.asks_owners:
            here = np.ones_like(here)
        return sample_superblocks(
            reading.step.layout, reading.blocks, reading.layer, reading.kv_heads, here
        )

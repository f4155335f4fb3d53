"""Holding superblocks to a bound on what they drop (`max_tau`), one step at a time.

Each superblock and KV head is measured on some of its rows. Above the bound its budget is doubled,
and if that is not enough it reads all pages; both are decided by the superblock's own rows, so not
by who computes it. Between two steps pages can be brought from other hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.sequence_parallel.csa.counts import BlockCounts, SparseCounts
from sps_runtime.attention.sequence_parallel.csa.reading import Reading
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.sparse_audit import Audit, Probe
from sps_runtime.attention.sparse_blocks import Mask
from sps_runtime.attention.sparse_choice import (
    all_pages,
    put_items,
    put_partial,
    take_blocks,
    take_items,
)
from sps_runtime.sparse.audit import audit
from sps_runtime.sparse.operators import Chosen

WIDENINGS = 2
"""What follows a first choice: twice the budget, then all pages."""

Places = list[tuple[Probe, int]]
"""Superblocks and KV heads."""


class Bound:
    """One layer of superblocks that have read what they chose.

    Attributes:
        chosen: what they read, or are about to.
        kept: its partial, changed in place.
        wanted: ``[pages of the layout's table, kv_heads]`` of all choices so far.
        lse_RH: weights of the audited rows over what is weighed here, to which the caller adds
            those of other hosts before the first widening.
    """

    def __init__(
        self,
        reading: Reading,
        found: Audit,
        counts: SparseCounts | BlockCounts,
        choice: tuple[Chosen, Mask],
        kept: Partial,
    ) -> None:
        self._reading, self._audit, self._counts = reading, found, counts
        self._places = [(probe, head) for probe in found.probes for head in range(reading.kv_heads)]
        self._lost = self._places
        self._changed: Ints = np.zeros(0, dtype=np.int64)
        (self.chosen, self.wanted), self.kept = choice, kept
        backend = reading.step.context.backend
        self.lse_RH = found.weigh(reading.q_THD, reading.pool, backend, reading.scale)

    def widen(self, number: int) -> Mask:
        """Choose again, for the `number`-th time (from 0), where too much may be lost.

        Returns:
            `wanted`, which grows where a wider choice reads more.
        """
        self._lost = self._above(self._lost)
        self._changed = np.zeros(0, dtype=np.int64)
        if self._lost:
            wider, of = self._wider() if number == 0 else self._everything()
            self._replace(wider, of)
            self.wanted = self.wanted | self._reading.wanted(self.chosen)
        return self.wanted

    def attend(self) -> None:
        """Attend to what the last widening chose."""
        if len(self._changed):
            lists = take_items(self.chosen, self._changed)
            put_partial(self.kept, lists, self._reading.attend(lists), self._reading.group)

    def record(self) -> None:
        """Count what was dropped in the end."""
        first_head = self._reading.step.context.mesh.tp_rank * self._reading.kv_heads
        for probe, head in self._places:
            dropped = self._dropped(probe, head)
            self._counts.record(
                probe.superblock.sequence,
                self._reading.layer,
                first_head + head,
                probe.superblock.position,
                float(dropped.mean()),
                float(dropped.max()),
            )

    def _dropped(self, probe: Probe, head: int) -> Tensor:
        return self._audit.dropped(probe, head, self.lse_RH, self.kept.lse)

    def _above(self, places: Places) -> Places:
        """Those that may lose more than allowed, with 95% confidence of the others."""
        dropped = self.chosen.dropped[:, 1].view(-1, self._reading.kv_heads)
        max_tau = self._reading.blocks.settings.max_tau
        above = []
        for probe, head in places:
            if not bool(dropped[probe.superblock.blocks, head].any()):
                continue
            if audit(self._dropped(probe, head).mean(1).tolist()).exceeds(max_tau):
                above.append((probe, head))
        return above

    def _wider(self) -> tuple[Chosen, Ints]:
        """A choice with twice the budget, and the query blocks that it is for."""
        reading = self._reading
        settings = reading.blocks.settings
        double = msgspec.structs.replace(settings, budget=min(1.0, 2 * settings.budget))
        of = np.unique(np.concatenate([_blocks(probe) for probe, _ in self._lost]))
        return reading.choose(take_blocks(reading.blocks.queries, of), double), of

    def _everything(self) -> tuple[Chosen, Ints]:
        """All pages, for all query blocks."""
        blocks = self._reading.blocks
        self._counts.fall_back([probe.superblock.sequence for probe, _ in self._lost])
        everything = all_pages(self._reading.step.layout, blocks, self._reading.kv_heads)
        return everything, np.arange(len(blocks.sequences))

    def _replace(self, other: Chosen, of: Ints) -> None:
        """Take another choice, of the query blocks `of`, where too much is lost."""
        kv_heads = self._reading.kv_heads
        items = np.concatenate([_blocks(probe) * kv_heads + head for probe, head in self._lost])
        at = np.searchsorted(of, items // kv_heads)
        self.chosen = put_items(self.chosen, items, other, at * kv_heads + items % kv_heads)
        self._changed = items


def hold(bounds: Sequence[Bound], nothing: Mask, bring: Callable[[Mask], None]) -> None:
    """Widen until every bound is held.

    Args:
        nothing: an empty mask of the caller's page table, of which that of `bounds` is a beginning.
        bring: called with all that is wanted before each widening is attended to, also without
            bounds: between hosts other members' may need pages of this rank.
    """
    for number in range(WIDENINGS):
        wanted = nothing.copy()
        for bound in bounds:
            more = bound.widen(number)
            wanted[: len(more)] |= more
        bring(wanted)
        for bound in bounds:
            bound.attend()
    for bound in bounds:
        bound.record()


def _blocks(probe: Probe) -> Ints:
    return np.arange(probe.superblock.blocks.start, probe.superblock.blocks.stop)

"""Measuring what a superblock dropped: exact weights of some rows beside the chosen ones'.

A row's dropped mass is 1 - exp(lse of what it read - lse of all it may see). Which rows are asked
depends on the layer, the KV head and the block's place alone, so on no rank and no chunk. Weights
over pages of other hosts are added by whoever asks there (`audit_routes`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool
from sps_runtime.attention.page_reads import ranges
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks
from sps_runtime.attention.sparse_choice import kept_pages
from sps_runtime.sparse.audit import mean_upper_bound
from sps_runtime.sparse.estimators.registry import estimator
from sps_runtime.sparse.torch_operators import IN_BLOB
from sps_runtime.types.attention import SparseSettings

ROWS = 64
"""Of a superblock: without any loss among so many, the mean dropped mass is below 0.046 with 95%
confidence."""


def reads_everything(settings: SparseSettings) -> bool:
    """Whether all pages before a block are fetched without asking: the estimator has no use for
    summaries, no sample can show the bound, or every row of a superblock would be audited, which
    sends more than it can save."""
    found = estimator(settings.estimator)
    reads_keys = not found.needs <= IN_BLOB or hasattr(found, "probed")
    hopeless = settings.max_tau < mean_upper_bound(0.0, ROWS)
    return reads_keys or hopeless or (settings.max_tau < 1 and settings.superblock <= ROWS)


def asks_owners(settings: SparseSettings) -> bool:
    """Whether audited rows are weighed where pages lie: a bound is held, and pages of other hosts
    are not fetched in any case."""
    return settings.max_tau < 1 and not reads_everything(settings)


def held_pages(layout: ShardLayout) -> Mask:
    """Pages of the layout's table that belong to sequences of which owners are asked."""
    asks = [settings is not None and asks_owners(settings) for settings in layout.sparse]
    held: Mask = np.repeat(np.array(asks, dtype=np.bool_), np.diff(layout.pages.first))
    return held


@dataclass(frozen=True)
class Superblock:
    """The part of a superblock that a step computes, which begins with it.

    Attributes:
        row: the first of its rows on the rank that computes it.
        position: of its first token.
        tokens: in it.
        entry: its sequence's first entry in the layout's page table.
        pages: of the sequence that lie before it.
        kv_len: tokens of the sequence after the step.
        sequence: index in the plan.
        blocks: its query blocks.
    """

    row: int
    position: int
    tokens: int
    entry: int
    pages: int
    kv_len: int
    sequence: int
    blocks: slice

    @property
    def audited(self) -> int:
        """How many of its rows are measured."""
        return min(ROWS, self.tokens)

    def before(self, at: int, kv_heads: int) -> tuple[int, ...]:
        """The item (`PageLists`) of its audited rows, laid from `at` on, over pages before it."""
        return (at, self.audited, self.position, self.entry, self.pages, self.kv_len, 0, kv_heads)

    def inside(
        self, at: int, offsets: Ints, page_size: int, kv_heads: int
    ) -> list[tuple[int, ...]]:
        """The items of the same rows over its own pages, row by row."""
        entry = self.entry + self.pages
        items: list[tuple[int, ...]] = []
        for index, offset in enumerate(offsets.tolist()):
            seen = (self.position + offset) // page_size + 1 - self.pages
            place = (at + index, 1, self.position + offset)
            items.append((*place, entry, seen, self.kv_len, 0, kv_heads))
        return items


def superblocks(layout: ShardLayout, blocks: SparseBlocks) -> list[Superblock]:
    """Those of a member's query blocks, in order of rows."""
    table, found = blocks.queries.blocks.numpy().astype(np.int64), []
    for number in range(blocks.queries.superblocks):
        own = np.flatnonzero(table[:, 3] == number)
        first, last = table[own[0]].tolist(), table[own[-1]].tolist()
        row, _, position, _, entry, kv_len = first
        found.append(
            Superblock(
                row=row,
                position=position,
                tokens=last[2] + last[1] - position,
                entry=entry,
                pages=position // layout.page_size,
                kv_len=kv_len,
                sequence=int(blocks.sequences[own[0]]),
                blocks=slice(int(own[0]), int(own[-1]) + 1),
            )
        )
    return found


@dataclass(frozen=True)
class Probe:
    """Audited rows of one superblock, for all KV heads of this rank.

    Attributes:
        rows: where they stand among an `Audit`'s rows.
    """

    superblock: Superblock
    rows: slice


@dataclass(frozen=True)
class Audit:
    """Rows to measure, laid end to end.

    Attributes:
        probes: what is measured.
        rows: int64 rows of the step's queries.
        parts: lists of the pages that the rows may see and that are weighed here, over disjoint
            keys.
        pages: ``[pages of the layout's table, kv_heads]`` that these read.
    """

    probes: list[Probe]
    rows: Tensor
    parts: list[PageLists]
    pages: Mask

    def weigh(
        self, q_THD: Tensor, pool: PagePool, backend: AttentionBackend, scale: float
    ) -> Tensor:
        """lse over the keys that are weighed here ``[rows, heads]``."""
        q = q_THD[self.rows]
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for lists in self.parts:
            lse = torch.logaddexp(lse, backend.partial_lists(q, lists, pool, scale=scale).lse)
        return lse

    def dropped(self, probe: Probe, head: int, lse_RH: Tensor, kept_lse_TH: Tensor) -> Tensor:
        """Dropped mass of one probe's rows ``[rows, query heads of a KV head]``, in [0, 1].

        Args:
            lse_RH: over all keys that the rows may see.
            kept_lse_TH: of what all the step's rows read, without any tail.
        """
        group = lse_RH.shape[1] // self.pages.shape[1]
        heads = slice(head * group, (head + 1) * group)
        kept = kept_lse_TH[self.rows[probe.rows], heads]
        return (1 - torch.exp(kept - lse_RH[probe.rows, heads])).clamp(0.0, 1.0)


def sample_superblocks(
    layout: ShardLayout, blocks: SparseBlocks, layer: int, kv_heads: int, here: Mask
) -> Audit:
    """`ROWS` rows of every superblock, evenly spaced, for all heads.

    Pages before a superblock are read for all of its rows at once, those inside row by row.

    Args:
        here: pages of the layout's table that are weighed here, those inside among them.
    """
    probes: list[Probe] = []
    rows, before, inside, at = [], [], [], 0
    for one in superblocks(layout, blocks):
        offsets = spread(one.tokens, layer, one.position)
        probes.append(Probe(one, slice(at, at + len(offsets))))
        rows.append(one.row + offsets)
        before.append(one.before(at, kv_heads))
        inside += one.inside(at, offsets, layout.page_size, kv_heads)
        at += len(offsets)
    parts = [table_lists(layout, before, here), table_lists(layout, inside, here)]
    read = np.zeros(len(here), dtype=np.bool_)
    for items in (before, inside):
        columns = np.array(items, dtype=np.int64).reshape(-1, 8).T
        read[ranges(columns[3], columns[4])] = True
    pages = np.repeat((read & here)[:, None], kv_heads, axis=1)
    index = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return Audit(probes, torch.from_numpy(index), parts, pages)


def table_lists(layout: ShardLayout, items: list[tuple[int, ...]], kept: Mask) -> PageLists:
    """Items (`PageLists`) whose entries are places in the layout's page table, without pages that
    are not `kept`."""
    array = np.array(items, dtype=np.int32).reshape(-1, 8)
    ids, positions = torch.tensor(layout.pages.ids), torch.from_numpy(layout.pages.positions)
    return kept_pages(PageLists(torch.from_numpy(array), ids, positions), kept)


def spread(tokens: int, layer: int, position: int) -> Ints:
    """Evenly spaced offsets into a superblock, from a place that its own depends on."""
    count = min(ROWS, tokens)
    name = f"{layer}/{position}".encode()
    drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2.0**64
    spread: Ints = ((np.arange(count) + drawn) * tokens / count).astype(np.int64)
    return spread

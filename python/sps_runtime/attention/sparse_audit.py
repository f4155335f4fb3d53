"""Measuring what a superblock dropped: exact weights of some rows beside the chosen ones'.

A row's dropped mass is 1 - exp(lse of what it read - lse of all it may see). Which rows are asked
depends on the layer, the KV head and the block's place alone, so on no rank and no chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool
from sps_runtime.attention.page_reads import ranges
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks

ROWS = 64
"""Of a superblock: without any loss among so many, the mean dropped mass is below 0.046 with 95%
confidence."""


@dataclass(frozen=True)
class Probe:
    """Audited rows of one superblock, and the KV heads that they are asked for.

    Attributes:
        position: of the superblock's first token.
        sequence: index in the plan.
        heads: KV heads of this rank.
        rows: where they stand among an `Audit`'s rows.
        blocks: the query blocks that they belong to.
    """

    position: int
    sequence: int
    heads: tuple[int, ...]
    rows: slice
    blocks: slice


@dataclass(frozen=True)
class Audit:
    """Rows to measure, laid end to end.

    Attributes:
        probes: what is measured.
        rows: int64 rows of the step's queries.
        parts: lists of all pages that the rows may see, over disjoint keys.
        pages: ``[pages of the layout's table, kv_heads]`` that these read.
    """

    probes: list[Probe]
    rows: Tensor
    parts: list[PageLists]
    pages: Mask

    def weigh(
        self, q_THD: Tensor, pool: PagePool, backend: AttentionBackend, scale: float
    ) -> Tensor:
        """lse over all keys that the rows may see ``[rows, heads]``; -inf for heads not asked."""
        q = q_THD[self.rows]
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for lists in self.parts:
            lse = torch.logaddexp(lse, backend.partial_lists(q, lists, pool, scale=scale).lse)
        return lse

    def dropped(self, probe: Probe, head: int, lse_RH: Tensor, kept_lse_TH: Tensor) -> Tensor:
        """Dropped mass of one probe's rows ``[rows, query heads of a KV head]``, in [0, 1].

        Args:
            lse_RH: what `weigh` returned.
            kept_lse_TH: of what all the step's rows read, without any tail.
        """
        group = lse_RH.shape[1] // self.pages.shape[1]
        heads = slice(head * group, (head + 1) * group)
        kept = kept_lse_TH[self.rows[probe.rows], heads]
        return (1 - torch.exp(kept - lse_RH[probe.rows, heads])).clamp(0.0, 1.0)


def sample_superblocks(
    layout: ShardLayout, blocks: SparseBlocks, layer: int, kv_heads: int
) -> Audit:
    """`ROWS` rows of every superblock, evenly spaced, for all heads.

    Pages before a superblock are read for all of its rows at once, those inside row by row.
    """
    probes, before, inside, rows, at = [], [], [], [], 0
    table = blocks.queries.blocks.numpy().astype(np.int64)
    everything = (0, kv_heads)
    for number in range(blocks.queries.superblocks):
        own = np.flatnonzero(table[:, 3] == number)
        first, last = table[own[0]], table[own[-1]]
        begin, entry, kv_len = int(first[2]), int(first[4]), int(first[5])
        chosen = spread(int(last[2] + last[1] - begin), layer, begin)
        pages = begin // layout.page_size
        before.append((at, len(chosen), begin, entry, pages, kv_len, *everything))
        for index, offset in enumerate(chosen.tolist()):
            seen = (begin + offset) // layout.page_size + 1 - pages
            inside.append((at + index, 1, begin + offset, entry + pages, seen, kv_len, *everything))
        rows.append(int(first[0]) + chosen)
        span = slice(int(own[0]), int(own[-1]) + 1)
        sequence = int(blocks.sequences[own[0]])
        probes.append(
            Probe(begin, sequence, tuple(range(kv_heads)), slice(at, at + len(chosen)), span)
        )
        at += len(chosen)
    return _audit(layout, blocks, probes, rows, [before, inside], kv_heads)


def spread(tokens: int, layer: int, position: int) -> Ints:
    """Evenly spaced offsets into a superblock, from a place that its own depends on."""
    count = min(ROWS, tokens)
    name = f"{layer}/{position}".encode()
    drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2.0**64
    spread: Ints = ((np.arange(count) + drawn) * tokens / count).astype(np.int64)
    return spread


def _audit(
    layout: ShardLayout,
    blocks: SparseBlocks,
    probes: list[Probe],
    rows: Sequence[Ints],
    parts: Sequence[Sequence[tuple[int, ...]]],
    kv_heads: int,
) -> Audit:
    pages = np.zeros((len(layout.pages.ids), kv_heads), dtype=np.bool_)
    lists = []
    ids, positions = blocks.queries.page_ids, torch.from_numpy(layout.pages.positions)
    for items in parts:
        array = np.array(items, dtype=np.int64).reshape(-1, 8)
        for head in range(kv_heads):
            asked = array[(array[:, 6] <= head) & (head < array[:, 6] + array[:, 7])]
            pages[ranges(asked[:, 3], asked[:, 4]), head] = True
        lists.append(PageLists(torch.from_numpy(array.astype(np.int32)), ids, positions))
    index = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return Audit(probes, torch.from_numpy(index), lists, pages)

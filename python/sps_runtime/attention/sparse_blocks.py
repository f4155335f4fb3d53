"""Which query blocks of a step are sparse, and what their choices come to: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sps_runtime.attention.page_reads import ranges
from sps_runtime.attention.shard_layout import Ints, Runs, ShardLayout
from sps_runtime.sparse.operators import Chosen, QueryBlocks
from sps_runtime.types.attention import SparseSettings

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SparseBlocks:
    """The query blocks of one member that have the same settings.

    Attributes:
        settings: with `block` a multiple of the page.
        queries: what operators are given; its `page_ids` are all pages of the layout.
        sequences: index in the plan of each block's sequence.
        rows: rows in all blocks.
    """

    settings: SparseSettings
    queries: QueryBlocks
    sequences: Ints
    rows: int


def split_runs(layout: ShardLayout, member: int) -> tuple[Runs, Runs]:
    """A member's runs that choose pages, and those that read all of them: sequences that are not
    sparse in this step, and superblocks of a single token.

    Raises:
        ValueError: a sparse run begins or ends inside a superblock (and not with its sequence).
    """
    runs = layout.runs(member)
    sparse: list[tuple[int, ...]] = []
    exact: list[tuple[int, ...]] = []
    for sequence, row, count, position in runs:
        settings = layout.sparse[sequence]
        if settings is None:
            exact.append((sequence, row, count, position))
            continue
        stop = position + count
        whole = stop == layout.lengths[sequence] or settings.align(stop) == stop
        if settings.align(position) != position or not whole:
            raise ValueError(f"epoch {layout.epoch} cuts a superblock at {position} or {stop}")
        alone = int(settings.align(stop - 1) == stop - 1)
        if count > alone:
            sparse.append((sequence, row, count - alone, position))
        if alone:
            exact.append((sequence, row + count - 1, 1, stop - 1))
    return _runs(sparse), _runs(exact)


def alone_pages(layout: ShardLayout, exact: Runs) -> Ints:
    """Pages that superblocks of a single token read, for each sequence of the plan."""
    found = np.zeros(len(layout.counts), dtype=np.int64)
    for sequence, _, _, position in exact:
        if layout.sparse[sequence] is not None:
            found[sequence] = position // layout.page_size + 1
    return found


def _runs(found: Sequence[tuple[int, ...]]) -> Runs:
    columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Runs(*columns)


def sparse_blocks(layout: ShardLayout, runs: Runs) -> list[SparseBlocks]:
    """The query blocks of sparse runs, by settings."""
    names: dict[SparseSettings, list[tuple[int, int, int, int]]] = {}
    for run in runs:
        settings = layout.sparse[run[0]]
        assert settings is not None
        names.setdefault(settings, []).append(run)
    return [_blocks(layout, settings, found) for settings, found in names.items()]


def _blocks(
    layout: ShardLayout, settings: SparseSettings, runs: Sequence[tuple[int, int, int, int]]
) -> SparseBlocks:
    size = max(settings.block, layout.page_size)
    sequence, row, count, position = np.array(runs, dtype=np.int64).T
    each = -(-count // size)
    at = ranges(np.zeros_like(each), each) * size
    of = np.repeat(np.arange(len(each)), each)
    sequences, first = sequence[of], position[of] + at
    wide = settings.superblock * np.where(first < settings.wide_from, 1, 2)
    superblock = first - first % wide
    new = (np.diff(sequences, prepend=-1) != 0) | (np.diff(superblock, prepend=-1) != 0)
    columns = (
        row[of] + at,
        np.minimum(size, count[of] - at),
        first,
        np.cumsum(new) - 1,
        layout.pages.first[sequences],
        layout.lengths[sequences],
    )
    blocks = torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))
    ids = torch.tensor(layout.pages.ids)
    queries = QueryBlocks(blocks, ids, int(new.sum()))
    return SparseBlocks(settings, queries, sequences, int(count.sum()))


def wanted_pages(layout: ShardLayout, blocks: SparseBlocks, chosen: Chosen, kv_heads: int) -> Mask:
    """Which pages of the layout's table some query block reads, for each KV head:
    ``[pages, kv_heads]``. What is not here must be fetched."""
    items = chosen.items.numpy()
    count = items[:, 4].astype(np.int64)
    head = np.repeat(items[:, 6].astype(np.int64), count)
    first = np.repeat(np.repeat(layout.pages.first[blocks.sequences], kv_heads), count)
    entries = ranges(items[:, 3].astype(np.int64), count)
    page = first + chosen.page_positions.numpy()[entries] // layout.page_size
    wanted = np.zeros((len(layout.pages.ids), kv_heads), dtype=np.bool_)
    wanted[page, head] = True
    return wanted


def summaries_due(layout: ShardLayout, need: Mask) -> Mask:
    """Pages whose summaries a member must have after a step and has not had before: those that its
    rows see, and all of a prompt that goes on, because later steps count on them."""
    pages, each = layout.pages, np.diff(layout.pages.first)
    sparse = np.array([settings is not None for settings in layout.sparse], dtype=np.bool_)
    goes_on = np.repeat(sparse & ~np.array(layout.ends, dtype=np.bool_), each)
    unknown = pages.positions >= np.repeat(layout.summaries_from, each)
    due: Mask = (need | goes_on) & unknown & (pages.tokens == layout.page_size)
    return due


def pairs(blocks: SparseBlocks, chosen: Chosen, page_size: int, kv_heads: int) -> tuple[Ints, Ints]:
    """(query block, page, KV head) that each block reads, and that a causal mask allows."""
    read = chosen.items[:, 4].reshape(-1, kv_heads).sum(1).numpy().astype(np.int64)
    table = blocks.queries.blocks.numpy().astype(np.int64)
    causal = -(-(table[:, 2] + table[:, 1]) // page_size) * kv_heads
    return read, causal


def new_pages(layout: ShardLayout, sp_rank: int) -> Ints:
    """Places in the layout's table of a rank's pages that sparse sequences fill in this step."""
    pages = layout.pages
    sequence = np.repeat(np.arange(len(layout.counts)), np.diff(pages.first))
    sparse = np.array([settings is not None for settings in layout.sparse], dtype=np.bool_)
    new = pages.positions >= layout.starts[sequence]
    full = pages.tokens == layout.page_size
    return np.flatnonzero(sparse[sequence] & new & full & (pages.owners == sp_rank))

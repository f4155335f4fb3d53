"""Which rows are measured, whatever comes of it: integers only, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.attention.sparse_blocks import SparseBlocks
from sps_runtime.sparse.audit import sampled_blocks
from sps_runtime.types.attention import SparseSettings

SHARE = 0.015
"""Of (layer, query block, KV head); of a prompt's last block all layers and heads."""
ROWS, LAST_ROWS = 8, 16
"""Of a sampled block, and of a prompt's last: evenly spaced, the last among them."""


@dataclass(frozen=True)
class Sample:
    """Rows of one query block in one layer and KV head of this TP rank.

    Attributes:
        sequence: index in the plan.
        position: of the block.
        offsets: into the block.
        row: the block's first row on the rank that computes it.
        kv_len: tokens of the sequence after the step.
        pages: places in the layout's page table: the sequence's first page, the block's first, and
            the one after its last.
    """

    layer: int
    head: int
    settings: SparseSettings
    sequence: int
    position: int
    offsets: tuple[int, ...]
    row: int
    kv_len: int
    pages: tuple[int, int, int]


def samples(
    layout: ShardLayout, found: Sequence[SparseBlocks], layers: int, heads: range
) -> list[Sample]:
    """What is sampled of a member's blocks; where settings bound what may be dropped, all
    superblocks are measured anyway.

    Args:
        heads: this TP rank's KV heads in the model.
    """
    taken = []
    for blocks in found:
        if blocks.settings.max_tau < 1:
            continue
        table = blocks.queries.blocks.numpy().astype(np.int64)
        ends = np.array(layout.ends, dtype=np.bool_)[blocks.sequences]
        last = ends & (table[:, 2] + table[:, 1] == table[:, 5])
        number, head_number = np.arange(layers)[:, None, None], np.array(heads)[:, None]
        drawn = sampled_blocks(0, number, head_number, table[:, 2], SHARE)
        for layer, head, block in np.argwhere((drawn | last) & (table[:, 2] > 0)).tolist():
            most = LAST_ROWS if last[block] else ROWS
            taken.append(_sample(layout, blocks, block, layer, head, most))
    return taken


def _sample(
    layout: ShardLayout, blocks: SparseBlocks, block: int, layer: int, head: int, most: int
) -> Sample:
    row, rows, position, _, entry, kv_len = blocks.queries.blocks[block].tolist()
    count, size = min(most, rows), layout.page_size
    return Sample(
        layer=layer,
        head=head,
        settings=blocks.settings,
        sequence=int(blocks.sequences[block]),
        position=position,
        offsets=tuple(i * rows // count - 1 for i in range(1, count + 1)),
        row=row,
        kv_len=kv_len,
        pages=(entry, entry + position // size, entry - (-(position + rows) // size)),
    )

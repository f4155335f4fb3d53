"""Audited rows on their way to pages of other hosts: who weighs what, from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool
from sps_runtime.attention.page_reads import ranges
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.attention.sparse_audit import asks_owners, superblocks, table_lists
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks


@dataclass(frozen=True)
class AuditRoute:
    """What one reader asks of one owner, in each layer: weights of the audited rows of superblocks
    before which the owner has pages. How many these are depends on no layer.

    Attributes:
        rows: int64, which of the reader's audited rows they are; all whose owners are asked
            (`asks_owners`) are counted, laid end to end.
        lists: the owner's pages before their superblocks, of the rows as they arrive.
        sequences: each row's, as an index in the plan.
    """

    rows: Tensor
    lists: PageLists
    sequences: Ints

    def weigh(
        self, q_RHD: Tensor, pool: PagePool, backend: AttentionBackend, scale: float
    ) -> Tensor:
        """The owner's answer to rows that came: lse over its pages ``[rows, heads]``, fp32."""
        return backend.partial_lists(q_RHD, self.lists, pool, scale=scale).lse.contiguous()

    def add(self, lse_AH: Tensor, answer_RH: Tensor) -> None:
        """The reader's weights of all its audited rows, with an answer, in place."""
        lse_AH[self.rows] = torch.logaddexp(lse_AH[self.rows], answer_RH)


def audit_route(
    layout: ShardLayout, found: Sequence[SparseBlocks], owned: Mask, kv_heads: int
) -> AuditRoute | None:
    """The route of a reader's blocks to an owner; None where there is nothing to ask.

    Args:
        found: the reader's query blocks.
        owned: pages of the layout's table that the owner has.
    """
    at, sent = 0, 0
    first, sequences, items = [], [], []
    for blocks in found:
        if not asks_owners(blocks.settings):
            continue
        for one in superblocks(layout, blocks):
            if owned[one.entry : one.entry + one.pages].any():
                first.append(at)
                sequences.append(one.sequence)
                items.append(one.before(sent, kv_heads))
                sent += one.audited
            at += one.audited
    if not items:
        return None
    each = np.array([item[1] for item in items], dtype=np.int64)
    rows = ranges(np.array(first, dtype=np.int64), each)
    lists = table_lists(layout, items, owned)
    return AuditRoute(torch.from_numpy(rows), lists, np.repeat(sequences, each))

"""Query blocks over two ranks' pools, and what the reference makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.sparse.blob import BlobShape, decode
from sps_runtime.sparse.estimators.registry import estimator
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SparseOperators, SummaryPool
from sps_runtime.sparse.reference import Block, own_block
from sps_runtime.sparse.torch_operators import gather, selection_settings
from sps_runtime.types.attention import SparseSettings


@dataclass(frozen=True)
class BlockCase:
    """Attributes:
    block: tokens of a query block.
    """

    q_THD: Tensor
    k: list[Tensor]
    v: list[Tensor]
    queries: QueryBlocks
    summaries: SummaryPool
    scale: float
    block: int

    def choose(self, operators: SparseOperators, settings: SparseSettings) -> Chosen:
        arguments = (self.q_THD, self.queries, self.k, self.summaries, settings, self.scale)
        return operators.choose(*arguments)

    def shares(self, settings: SparseSettings) -> list[Tensor]:
        """Each block's shares by torch: ``[kv_heads, pages before]``."""
        pool, found = self.summaries, estimator(settings.estimator)
        page, slots, heads = pool.page_size, pool.slots_per_rank, self.k[0].shape[1]
        ids, blocks, shares = self.queries.page_ids, self.queries.blocks.tolist(), []
        q_KGTD = self.q_THD.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3) * self.scale
        shape = BlobShape(page, pool.head_dim, self.q_THD.dtype)
        tokens = Counter[int]()
        for _, rows, _, superblock, _, _ in blocks:
            tokens[superblock] += rows
        for row, rows, position, superblock, entry, _ in blocks:
            before, stop = position // page, -(-(position + rows) // page)
            of = ids[entry : entry + stop]
            keys = gather(self.k, slots, of[before:]).float()
            counts = (rows - torch.arange(len(keys)) * page).clamp(max=page)
            q = q_KGTD[:, :, row : row + rows]
            own = own_block(q, keys, keys, counts)
            block = Block(position, q, before, self.block // page, own)
            known = decode(gather(pool.pools, slots, of[:before]), shape)
            wide = selection_settings(settings, position, page, tokens[superblock])
            shares.append(block.shares(known, found, wide) if before else torch.zeros(heads, 0))
        return shares

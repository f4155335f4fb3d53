"""Small sequences over two ranks' pools, whose unwritten tokens and summaries are NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sps_runtime.sparse.blob import BlobShape, decode
from sps_runtime.sparse.estimators.registry import estimator
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.reference import Block, own_block
from sps_runtime.sparse.torch_operators import TorchOperators, gather, selection_settings
from sps_runtime.types.attention import SparseSettings

PAGE, HEADS, GROUP, SLOTS, BLOCK = 16, 2, 3, 24, 32


def sparse_settings(**changes: Any) -> SparseSettings:
    fields = {"budget": 0.4, "minimum": 4, "rows": 8, "superblock": 64, "block": BLOCK}
    more = {"wide_from": 1 << 20, "end": 0, "end_rows": 0}
    return SparseSettings(**fields | more | changes)


@dataclass(frozen=True)
class Case:
    """Two sequences over two ranks' pools: one whole, one whose last tokens are new."""

    q_THD: Tensor
    k: list[Tensor]
    v: list[Tensor]
    queries: QueryBlocks
    summaries: SummaryPool
    scale: float

    @classmethod
    def make(
        cls,
        dtype: torch.dtype,
        head_dim: int,
        lengths: tuple[tuple[int, int], ...] = ((118, 118), (192, 64)),
        superblock: int = 64,
        q_size: float = 2.0,
    ) -> Case:
        shape = (2, SLOTS, HEADS, PAGE, head_dim)
        sides = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
        blocks, ids, row, number = [], [], 0, 0
        free = torch.randperm(2 * SLOTS).tolist()
        full: list[int] = []
        for total, new in lengths:
            begin = len(ids)
            ids += [free.pop() for _ in range(-(-total // PAGE))]
            full += ids[begin : begin + total // PAGE]
            for at, page_id in enumerate(ids[begin:]):
                used = min(PAGE, total - at * PAGE)
                spread = torch.rand(HEADS, 1, head_dim) + 0.3
                for side in sides:
                    x = torch.randn(HEADS, used, head_dim) * spread
                    side.view(-1, *shape[2:])[page_id, :, :used] = x.to(dtype)
            for at in range(total - new, total, BLOCK):
                tokens = min(BLOCK, total - at)
                blocks.append((row, tokens, at, number + at // superblock, begin, total))
                row += tokens
            number += 1000
        k, v = (list(side.unbind()) for side in sides)
        operators = TorchOperators()
        nbytes = operators.summary_nbytes(PAGE, head_dim, dtype.itemsize)
        pools = [torch.full((SLOTS, HEADS, nbytes), 255, dtype=torch.uint8) for _ in range(2)]
        for rank, out in enumerate(pools):
            slots = [page % SLOTS for page in full if page // SLOTS == rank]
            operators.summarise(k[rank], v[rank], torch.tensor(slots, dtype=torch.int32), out)
        numbered = torch.tensor(blocks, dtype=torch.int32).reshape(-1, 6)
        queries = QueryBlocks(numbered, torch.tensor(ids, dtype=torch.int32), 0)
        q = torch.full((row, HEADS * GROUP, head_dim + 8), torch.nan, dtype=dtype)
        q[..., :head_dim] = (torch.randn(row, HEADS * GROUP, head_dim) * q_size).to(dtype)
        summaries = SummaryPool(pools, SLOTS, PAGE, head_dim)
        return cls(q[..., :head_dim], k, v, queries, summaries, head_dim**-0.5)

    def choose(self, operators, settings: SparseSettings) -> Chosen:
        arguments = (self.q_THD, self.queries, self.k, self.summaries, settings, self.scale)
        return operators.choose(*arguments)

    def shares(self, settings: SparseSettings) -> list[Tensor]:
        """Each block's shares by torch: ``[kv_heads, pages before]``."""
        pool, found = self.summaries, estimator(settings.estimator)
        ids, shares = self.queries.page_ids, []
        q_KGTD = self.q_THD.float().unflatten(1, (HEADS, -1)).permute(1, 2, 0, 3) * self.scale
        shape = BlobShape(PAGE, pool.head_dim, self.q_THD.dtype)
        for row, rows, position, _, entry, _ in self.queries.blocks.tolist():
            before, stop = position // PAGE, -(-(position + rows) // PAGE)
            of = ids[entry : entry + stop]
            keys = gather(self.k, SLOTS, of[before:]).float()
            counts = (rows - torch.arange(len(keys)) * PAGE).clamp(max=PAGE)
            q = q_KGTD[:, :, row : row + rows]
            block = Block(position, q, before, BLOCK // PAGE, own_block(q, keys, keys, counts))
            known = decode(gather(pool.pools, SLOTS, of[:before]), shape)
            wide = selection_settings(settings, position, PAGE, 1 << 20)
            shares.append(block.shares(known, found, wide) if before else torch.zeros(HEADS, 0))
        return shares

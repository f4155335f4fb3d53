"""Small sequences over two ranks' pools, whose unwritten tokens and summaries are NaN."""

from __future__ import annotations

from typing import Any

import torch
from test.kit.block_case import BlockCase

from sps_runtime.sparse.operators import QueryBlocks, SummaryPool
from sps_runtime.sparse.torch_operators import TorchOperators
from sps_runtime.types.attention import SparseSettings

PAGE, HEADS, GROUP, SLOTS, BLOCK = 16, 2, 3, 24, 32


def sparse_settings(**changes: Any) -> SparseSettings:
    fields = {"budget": 0.4, "minimum": 4, "rows": 8, "superblock": 64, "block": BLOCK}
    more = {"wide_from": 1 << 20, "end": 0, "end_rows": 0}
    return SparseSettings(**fields | more | changes)


def make_case(
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[tuple[int, int], ...] = ((118, 118), (192, 64)),
    superblock: int = 64,
    q_size: float = 2.0,
) -> BlockCase:
    """Sequences of so many tokens, so many of them new: one whole, one whose last are new."""
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
    return BlockCase(q[..., :head_dim], k, v, queries, summaries, head_dim**-0.5, BLOCK)

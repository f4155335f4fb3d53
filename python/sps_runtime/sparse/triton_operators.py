"""`sparse.operators.SparseOperators` by the Triton kernels.

The bytes of a summary are `sparse.blob`'s. Query blocks come from the host, where sizes are read;
what is chosen goes back to where they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sps_runtime.ops.merge_state import empty_state
from sps_runtime.ops.triton.choice import Limits, choose_pages
from sps_runtime.ops.triton.mean_tail import tail_attention
from sps_runtime.ops.triton.page_summary import summarise_pages
from sps_runtime.ops.triton.pools import PoolTables
from sps_runtime.ops.triton.scores import ScoredBlocks, page_masses, page_shares
from sps_runtime.sparse.estimators.patterns import random_shares
from sps_runtime.sparse.estimators.registry import BLOCK, RANDOM
from sps_runtime.sparse.kernel_operators import scored_rows
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.torch_operators import TorchOperators, minimum_pages
from sps_runtime.types.attention import SparseSettings


class TritonSparseOperators:
    """`SparseOperators` on one GPU; pages and summaries are read where they lie, those of other
    ranks of this host where they are mapped. Only `choose` waits for the device, once.

    Estimators other than `block` and forced page sets go to torch.
    """

    def __init__(self) -> None:
        self._tables = PoolTables()
        self._torch = TorchOperators()

    def summary_nbytes(self, page_size: int, head_dim: int, itemsize: int) -> int:
        return self._torch.summary_nbytes(page_size, head_dim, itemsize)

    def summarise(self, k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
        there = slots.to(k_SKBD.device, non_blocking=True)
        summarise_pages(k_SKBD, v_SKBD, there, out_SKX)

    def choose(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen:
        if settings.estimator not in (BLOCK, RANDOM):
            return self._torch.choose(q_THD, queries, k_pools, summaries, settings, scale)
        page, block = summaries.page_size, max(settings.block, summaries.page_size)
        k = self._tables.table(k_pools)
        home, kv_heads = queries.blocks.device, k.base.shape[1]
        queries = replace(queries, blocks=queries.blocks.cpu())
        scored = ScoredBlocks.of(
            queries.blocks, queries.page_ids, page_size=page, block=block,
            rows=torch.from_numpy(scored_rows(queries, settings)), device=q_THD.device,
        )  # fmt: skip
        if settings.estimator == RANDOM:
            shares = _forced_shares(scored, kv_heads)
        else:
            known = self._tables.table(summaries.pools)
            shares = page_shares(q_THD, scored, known, k, summaries.slots_per_rank, scale=scale)
        made = choose_pages(
            shares, queries.blocks, scored.page_ids, _limits(settings, block // page),
            page_size=page, kv_heads=kv_heads,
        )  # fmt: skip
        return Chosen(
            items=made.items.to(home),
            page_ids=made.page_ids.to(home),
            page_positions=made.page_positions.to(home),
            dropped=made.dropped.to(home),
            dropped_ids=made.dropped_ids.to(home),
            read_pairs=len(made.page_ids),
            causal_pairs=len(made.page_ids) + len(made.dropped_ids),
        )

    def choose_for_last_rows(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen | None:
        return None

    def masses(
        self,
        q_HD: Tensor,
        page_ids: Tensor,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Tensor:
        if settings.estimator != BLOCK:
            return self._torch.masses(q_HD, page_ids, k_pools, summaries, settings, scale)
        pools = self._tables.table(summaries.pools)
        return page_masses(
            q_HD,
            page_ids.to(q_HD.device, non_blocking=True),
            pools,
            summaries.slots_per_rank,
            kv_heads=pools.base.shape[1],
            page_size=summaries.page_size,
            scale=scale,
        )

    def tail(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        chosen: Chosen,
        summaries: SummaryPool,
        scale: float,
        onto: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        o_THD, lse_TH = empty_state(q_THD) if onto is None else onto

        def there(array: Tensor) -> Tensor:
            return array.to(q_THD.device, non_blocking=True)

        tail_attention(
            q_THD,
            there(queries.blocks),
            there(chosen.dropped),
            there(chosen.dropped_ids),
            self._tables.table(summaries.pools),
            summaries.slots_per_rank,
            o_THD,
            lse_TH,
            rows=int(queries.blocks[:, 1].max()) if len(queries.blocks) else 0,
            page_size=summaries.page_size,
            scale=scale,
            onto=onto is not None,
        )
        return o_THD, lse_TH


def _forced_shares(scored: ScoredBlocks, kv_heads: int) -> Tensor:
    """`estimators.patterns.random_shares` of each block, as `page_shares` has them."""
    shares = torch.zeros(len(scored.table), kv_heads, scored.width, device="cpu")
    for of, pages in zip(shares, scored.table[:, 4].tolist(), strict=True):
        of[:, :pages] = random_shares(kv_heads, pages)
    return shares.flatten(0, 1).to(scored.table.device)


def _limits(settings: SparseSettings, block_pages: int) -> Limits:
    return Limits(
        tau=settings.tau,
        budget=settings.budget,
        minimum=minimum_pages(settings),
        sink=settings.sink,
        window=settings.window,
        block_pages=block_pages,
        superblocks=settings.superblock > 0,
    )

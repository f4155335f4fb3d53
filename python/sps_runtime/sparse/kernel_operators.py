"""`sparse.operators.SparseOperators` by the kernels of `sps_kernel`.

The bytes of a summary are `sparse.blob`'s, so what kernels do not do is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.ops.merge_state import empty_state
from sps_runtime.sparse.estimators.patterns import random_shares
from sps_runtime.sparse.estimators.registry import BLOCK, RANDOM
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.torch_operators import TorchOperators, minimum_pages
from sps_runtime.types.attention import SparseSettings


class KernelSparseOperators:
    """`SparseOperators` over `sps_kernel`; pages and summaries are read where they lie.

    Other estimators than `block`, and head dims that are no multiple of 8 or under 16, go to torch.

    Args:
        kernels: the package (`ops.dispatch`).
        threads: threads of a call; 1 where ranks fill the cores.
    """

    def __init__(self, kernels: ModuleType, threads: int = 1) -> None:
        self._kernels = kernels
        self._threads = threads
        self._torch = TorchOperators()

    def summary_nbytes(self, page_size: int, head_dim: int, itemsize: int) -> int:
        return self._torch.summary_nbytes(page_size, head_dim, itemsize)

    def summarise(self, k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
        if not _fits(k_SKBD.shape[3]):
            return self._torch.summarise(k_SKBD, v_SKBD, slots, out_SKX)
        self._kernels.summarise_pages(k_SKBD, v_SKBD, slots, out_SKX, threads=self._threads)

    def choose(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen:
        if settings.estimator not in (BLOCK, RANDOM) or not _fits(summaries.head_dim):
            return self._torch.choose(q_THD, queries, k_pools, summaries, settings, scale)
        page, block = summaries.page_size, max(settings.block, summaries.page_size)
        heads = next(k.shape[1] for k in k_pools if len(k))
        if settings.estimator == RANDOM:
            before = (queries.blocks[:, 2] // page).tolist()
            shares = torch.cat([random_shares(heads, pages).flatten() for pages in before])
        else:
            where = (q_THD, queries, k_pools, summaries, scale)
            shares = self._shares(*where, rows=scored_rows(queries, settings), block=block)
        return self._chosen(shares, queries, page, heads, settings, settings.superblock > 0)

    def _shares(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        scale: float,
        *,
        rows: npt.NDArray[np.int64],
        block: int,
    ) -> Tensor:
        found: Tensor = self._kernels.page_shares(
            q_THD,
            queries.blocks,
            queries.page_ids,
            summaries.pools,
            k_pools,
            slots=summaries.slots_per_rank,
            rows=rows,
            block=block,
            scale=scale,
            threads=self._threads,
        )
        return found

    def _chosen(
        self,
        shares: Tensor,
        queries: QueryBlocks,
        page: int,
        heads: int,
        settings: SparseSettings,
        superblocks: bool,
    ) -> Chosen:
        made = self._kernels.choose_pages(
            shares,
            queries.blocks,
            queries.page_ids,
            page_size=page,
            kv_heads=heads,
            tau=settings.tau,
            budget=settings.budget,
            minimum=minimum_pages(settings),
            sink=settings.sink,
            window=settings.window,
            block=max(settings.block, page),
            superblocks=superblocks,
            threads=self._threads,
        )
        read = len(made.page_ids)
        return Chosen(
            made.items,
            made.page_ids,
            made.page_pos,
            made.dropped,
            made.dropped_ids,
            read_pairs=read,
            causal_pairs=read + len(made.dropped_ids),
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
        if settings.estimator != BLOCK or not _fits(summaries.head_dim):
            return None
        rows = np.ones(len(queries.blocks), np.int64)
        where = (q_THD, queries, k_pools, summaries, scale)
        shares = self._shares(*where, rows=rows, block=0)
        # Superblocks of one token read everything; these are tokens of which only one is known.
        blocks = queries.blocks.clone()
        blocks[:, 1].clamp_(min=2)
        heads = next(k.shape[1] for k in k_pools if len(k))
        known = QueryBlocks(blocks, queries.page_ids, queries.superblocks)
        return self._chosen(shares, known, summaries.page_size, heads, settings, False)

    def masses(
        self,
        q_HD: Tensor,
        page_ids: Tensor,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Tensor:
        return self._torch.masses(q_HD, page_ids, k_pools, summaries, settings, scale)

    def tail(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        chosen: Chosen,
        summaries: SummaryPool,
        scale: float,
        onto: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _fits(summaries.head_dim):
            return self._torch.tail(q_THD, queries, chosen, summaries, scale, onto)
        o_THD, lse_TH = empty_state(q_THD) if onto is None else onto
        self._kernels.tail_attention(
            q_THD,
            queries.blocks,
            chosen.dropped,
            chosen.dropped_ids,
            summaries.pools,
            slots=summaries.slots_per_rank,
            page_size=summaries.page_size,
            out=o_THD,
            lse=lse_TH,
            scale=scale,
            accumulate=onto is not None,
            threads=self._threads,
        )
        return o_THD, lse_TH


def scored_rows(queries: QueryBlocks, settings: SparseSettings) -> npt.NDArray[np.int64]:
    """Rows that are scored of each query block, 0 for all."""
    table = queries.blocks.numpy()
    tokens = np.bincount(table[:, 3], table[:, 1]).astype(np.int64)[table[:, 3]]
    pairs = zip(table[:, 2].tolist(), tokens.tolist(), strict=True)
    return np.array([settings.scored_rows(*pair) for pair in pairs])


def _fits(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim % 8 == 0

"""Partials by the kernels of `sps_kernel`: pages are read where they lie, nothing is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.run_lists import RunListCache
from sps_runtime.ops.kv_rows import row_format
from sps_runtime.ops.merge_state import empty_state, unwritten_state


class KernelBackend:
    """`attention.backend.AttentionBackend` over `sps_kernel.paged_attention`.

    Args:
        kernels: the package (`ops.dispatch`).
        threads: threads of a call; 1 where ranks fill the cores.
    """

    name = "sps_kernel"
    recordable = True

    def __init__(self, kernels: ModuleType, threads: int = 1) -> None:
        self._kernels = kernels
        self._threads = threads
        self._runs = RunListCache()

    def partial(
        self,
        q_THD: Tensor,
        runs: Sequence[QueryRun],
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
        kv_heads: tuple[int, int] | None = None,
    ) -> Partial:
        if not runs:
            return Partial(*empty_state(q_THD))
        pools = self._pools(pool, kv_heads, q_THD.shape[2])
        found = self._runs.get(runs, pools.kv_heads)
        complete = found.rows == len(q_THD)
        return self._attend(q_THD, pools, found.lists, complete, scale, window)

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        pools = self._pools(pool, None, q_THD.shape[2])
        return self._attend(q_THD, pools, lists, lists.complete, scale, window)

    def _attend(
        self,
        q_THD: Tensor,
        pools: Any,
        lists: PageLists,
        complete: bool,
        scale: float,
        window: int | None,
    ) -> Partial:
        """`complete`: every row is in some list, so none has to be empty beforehand."""
        o_THD, lse_TH = unwritten_state(q_THD) if complete else empty_state(q_THD)
        self._kernels.paged_attention(
            q_THD,
            pools,
            lists.items,
            lists.page_ids,
            lists.page_positions,
            out=o_THD,
            lse=lse_TH,
            scale=scale,
            window=window or 0,
            threads=self._threads,
        )
        return Partial(o_THD, lse_TH)

    def refresh(self, lists: PageLists) -> bool:
        return True

    def form(self, lists: PageLists) -> str | None:
        return ""

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        lse_TH = partials[0].lse.new_empty(partials[0].lse.shape)
        self._kernels.merge_n_states(
            [partial.o for partial in partials],
            [partial.lse for partial in partials],
            out=out_THD,
            lse_out=lse_TH,
            threads=self._threads,
        )

    def _pools(self, pool: PagePool, kv_heads: tuple[int, int] | None, head_dim: int) -> Any:
        """The pools as the kernels want them: all of one shape. One that cannot be read stands in
        as any other: no page id names it."""
        some = next(index for index, k in enumerate(pool.k) if len(k))
        sides = []
        for tensors in (pool.k, pool.v):
            whole = [tensor if len(tensor) else tensors[some] for tensor in tensors]
            sides.append(whole if kv_heads is None else [t[:, slice(*kv_heads)] for t in whole])
        return self._kernels.KVPools(*sides, row_format(pool.k[some], head_dim))

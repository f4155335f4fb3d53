"""Partials by the kernels of `sps_kernel`: pages are read where they lie, nothing is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.ops.kv_rows import row_format

_REMEMBERED = 8


@dataclass(frozen=True)
class _Packed:
    """Runs as the kernels take them. Holds on to `runs`, so that no other list gets its identity.

    Attributes:
        items: int32 ``[runs, 8]``, columns `sps_kernel.ITEM_FIELDS`.
        rows: query rows in all runs.
    """

    runs: Sequence[QueryRun]
    items: Tensor
    page_ids: Tensor
    page_positions: Tensor
    rows: int


def _pack(runs: Sequence[QueryRun], kv_heads: int) -> _Packed:
    items = []
    at = 0
    for run in runs:
        pages = len(run.page_ids)
        items.append((run.row, run.count, run.position, at, pages, run.kv_len, 0, kv_heads))
        at += pages
    return _Packed(
        runs,
        torch.tensor(items, dtype=torch.int32),
        torch.cat([run.page_ids for run in runs]),
        torch.cat([run.page_positions for run in runs]),
        sum(run.count for run in runs),
    )


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
        self._packed: dict[tuple[int, int], _Packed] = {}

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
            return Partial(*_empty(q_THD))
        pools = self._pools(pool, kv_heads, q_THD.shape[2])
        packed = self._pack(runs, pools.kv_heads)
        complete = packed.rows == len(q_THD)
        return self._attend(q_THD, pools, packed, complete, scale, window)

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
        lists: _Packed | PageLists,
        complete: bool,
        scale: float,
        window: int | None,
    ) -> Partial:
        """`complete`: every row is in some list, so none has to be empty beforehand."""
        o_THD, lse_TH = _unwritten(q_THD) if complete else _empty(q_THD)
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

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        lse_TH = partials[0].lse.new_empty(partials[0].lse.shape)
        self._kernels.merge_n_states(
            [partial.o for partial in partials],
            [partial.lse for partial in partials],
            out=out_THD,
            lse_out=lse_TH,
            threads=self._threads,
        )

    def _pack(self, runs: Sequence[QueryRun], kv_heads: int) -> _Packed:
        """Packed runs; a step's layers pass the same list, so it is packed once."""
        key = (id(runs), kv_heads)
        packed = self._packed.get(key)
        if packed is None:
            if len(self._packed) >= _REMEMBERED:
                del self._packed[next(iter(self._packed))]
            packed = self._packed[key] = _pack(runs, kv_heads)
        return packed

    def _pools(self, pool: PagePool, kv_heads: tuple[int, int] | None, head_dim: int) -> Any:
        """The pools as the kernels want them: all of one shape. One that cannot be read stands in
        as any other: no page id names it."""
        some = next(index for index, k in enumerate(pool.k) if len(k))
        sides = []
        for tensors in (pool.k, pool.v):
            whole = [tensor if len(tensor) else tensors[some] for tensor in tensors]
            sides.append(whole if kv_heads is None else [t[:, slice(*kv_heads)] for t in whole])
        return self._kernels.KVPools(*sides, row_format(pool.k[some], head_dim))


def _unwritten(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    o_THD = q_THD.new_empty(q_THD.shape, dtype=torch.float32)
    return o_THD, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


def _empty(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """The partial of queries that saw no key."""
    o_THD = q_THD.new_zeros(q_THD.shape, dtype=torch.float32)
    return o_THD, q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32)

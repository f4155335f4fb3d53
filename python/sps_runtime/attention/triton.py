"""Partials by the Triton kernels: what a GPU runs where FlashInfer is not installed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.run_lists import RunListCache
from sps_runtime.ops.merge_state import empty_state, unwritten_state
from sps_runtime.ops.triton.attention import Sizes, paged_attention
from sps_runtime.ops.triton.pools import PoolTables
from sps_runtime.ops.triton.states import merge_states

STANDING = 256
"""Lists that stay whose mirrors are kept: more than recorded steps have shapes and windows."""


@dataclass(frozen=True)
class _Standing:
    """Lists that stay. Holds on to `here`, so that no others get their identity.

    Attributes:
        here, there: on the host, where they are written, and on the device.
        sizes: of all that they can hold.
    """

    here: PageLists
    there: PageLists
    sizes: Sizes

    def upload(self) -> None:
        """The values that they hold now, in the order of the current stream."""
        for to, array in zip(_arrays(self.there), _arrays(self.here), strict=True):
            to.copy_(array, non_blocking=True)


class TritonBackend:
    """`attention.backend.AttentionBackend` on one GPU. Nothing waits for the device.

    Pages of a multiple of 16 tokens, heads of up to 256 dims. Pools of other ranks of this host are
    read where they are mapped. Arrays of pages may lie on the host or on the device; where items
    lie on the device their sizes are guessed, which costs speed at most.

    Args:
        processors: of the device; decode splits lists until that many programs run.
    """

    name = "triton"
    recordable = True

    def __init__(self, processors: int | None = None) -> None:
        self._processors = processors
        self._tables = PoolTables()
        self._runs = RunListCache()
        self._standing: OrderedDict[int, _Standing] = OrderedDict()

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
        k, v = (_heads(side, kv_heads) for side in (pool.k, pool.v))
        shared = next(tensor.shape[1] for tensor in k if len(tensor))
        found = self._runs.get(runs, shared, q_THD.device)
        sizes = Sizes(found.longest, shared, found.pages, self._processors_of(q_THD.device))
        made = unwritten_state if found.rows == len(q_THD) else empty_state
        partial = Partial(*made(q_THD))
        self._attend(q_THD, PagePool(k, v, pool.slots_per_rank), found.lists, partial, sizes, scale,
                     window)  # fmt: skip
        return partial

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        partial = Partial(*(unwritten_state if lists.complete else empty_state)(q_THD))
        if len(lists.items):
            sizes = None
            if lists.standing:
                lists, sizes = self._mirrored(q_THD, lists, pool)
            sizes = sizes or self._sizes(q_THD, lists, pool)
            self._attend(q_THD, pool, lists, partial, sizes, scale, window)
        return partial

    def refresh(self, lists: PageLists) -> bool:
        found = self._standing.get(id(lists))
        if found is not None:
            found.upload()
        return True

    def form(self, lists: PageLists) -> str | None:
        return ""

    def _mirrored(self, q_THD: Tensor, lists: PageLists, pool: PagePool) -> tuple[PageLists, Sizes]:
        """Lists that stay, on the device where a graph may hold them, and sizes that bound all that
        they will ever hold."""
        found = self._standing.get(id(lists))
        if found is None:
            kv_heads = next(k.shape[1] for k in pool.k if len(k))
            pages = -(-len(lists.page_ids) // len(lists.items))
            rows = int(lists.items[:, 1].max())
            sizes = Sizes(rows, kv_heads, pages, self._processors_of(q_THD.device))
            found = _Standing(lists, _on(lists, q_THD.device), sizes)
            self._standing[id(lists)] = found
            while len(self._standing) > STANDING:
                self._standing.popitem(last=False)
        return found.there, found.sizes

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        merge_states([(partial.o, partial.lse) for partial in partials], out_THD)

    def _attend(
        self,
        q_THD: Tensor,
        pool: PagePool,
        lists: PageLists,
        partial: Partial,
        sizes: Sizes,
        scale: float,
        window: int | None,
    ) -> None:

        def there(array: Tensor) -> Tensor:
            return array.to(q_THD.device, non_blocking=True)

        paged_attention(
            q_THD,
            self._tables.table(pool.k),
            self._tables.table(pool.v),
            pool.slots_per_rank,
            there(lists.items),
            there(lists.page_ids),
            there(lists.page_positions),
            partial.o,
            partial.lse,
            sizes=sizes,
            scale=scale,
            window=window,
        )

    def _sizes(self, q_THD: Tensor, lists: PageLists, pool: PagePool) -> Sizes:
        items, entries = lists.items, len(lists.page_ids)
        processors = self._processors_of(q_THD.device)
        if items.device.type == "cpu":
            _, rows, _, _, pages, _, _, kv_heads = items.amax(0).tolist()
            return Sizes(rows, kv_heads, pages, processors)
        kv_heads = next(k.shape[1] for k in pool.k if len(k))
        rows = -(-len(q_THD) * kv_heads // len(items))  # as many as if each item had one head
        return Sizes(max(1, rows), 1, -(-entries // len(items)), processors)

    def _processors_of(self, device: torch.device) -> int:
        if self._processors is None:
            on_gpu = device.type == "cuda"
            properties = torch.cuda.get_device_properties(device) if on_gpu else None
            self._processors = properties.multi_processor_count if properties else 1
        return self._processors


def _on(lists: PageLists, device: torch.device) -> PageLists:
    items, ids, positions = (
        torch.empty_like(array, device=device).copy_(array) for array in _arrays(lists)
    )
    return PageLists(items, ids, positions, lists.complete)


def _arrays(lists: PageLists) -> tuple[Tensor, Tensor, Tensor]:
    return lists.items, lists.page_ids, lists.page_positions


def _heads(pools: Sequence[Tensor], kv_heads: tuple[int, int] | None) -> list[Tensor]:
    return [pool if kv_heads is None else pool[:, slice(*kv_heads)] for pool in pools]

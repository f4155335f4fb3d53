"""`SparseOperators` in plain torch: what kernels must compute, and all estimators but `block`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.ops.merge_state import merge_state
from sps_runtime.sparse import blob
from sps_runtime.sparse.estimators.protocol import Estimator, ProbingEstimator
from sps_runtime.sparse.estimators.registry import BLOCK, RANDOM, estimator, whole_blocks
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SummaryPool
from sps_runtime.sparse.reference import Block, choose, own_block
from sps_runtime.sparse.selection import SelectionSettings
from sps_runtime.sparse.summaries import PageSummaries, summarise
from sps_runtime.types.attention import SparseSettings

IN_BLOB = frozenset({"mean_k_NKD", "mean_v_NKD", "low_NKD", "high_NKD", "sketch_NKBR"})


def selection_settings(
    settings: SparseSettings, position: int, page_size: int, tokens: int
) -> SelectionSettings:
    """What `settings` mean for the superblock that holds a position and has so many tokens."""
    first, every_row = settings.align(position), whole_blocks(estimator(settings.estimator))
    last = settings.superblock_end(position) - 1
    return SelectionSettings(
        tau=settings.tau,
        budget=settings.budget,
        minimum=minimum_pages(settings),
        sink=settings.sink,
        window=settings.window,
        block=max(settings.block, page_size),
        fetch_block=settings.superblock_at(position),
        representatives=0 if every_row else settings.scored_rows(first, tokens),
        end_representatives=0 if every_row else settings.scored_rows(last, tokens),
        end=settings.end,
    )


def minimum_pages(settings: SparseSettings) -> int:
    """Of forced page sets the budget alone says how many they are."""
    return 0 if settings.estimator == RANDOM else settings.minimum


class TorchOperators:
    """`sparse.operators.SparseOperators`; the bytes of a summary are `sparse.blob`'s."""

    def summary_nbytes(self, page_size: int, head_dim: int, itemsize: int) -> int:
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        return blob.BlobShape(page_size, head_dim, dtype).nbytes

    def summarise(self, k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
        at = slots.long()
        out_SKX[at] = blob.encode(k_SKBD[at], v_SKBD[at])

    def choose(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen:
        found = estimator(settings.estimator)
        chosen = _Lists(summaries)
        pages = _Pages(k_pools, summaries, q_THD.dtype, found)
        q_KGTD = _by_head(q_THD, pages.kv_heads, scale)
        for superblock in _superblocks(queries):
            first = superblock[0]
            tokens = sum(block.rows for block in superblock)
            wide = selection_settings(settings, first.position, summaries.page_size, tokens)
            ids = queries.page_ids[first.entry : first.entry + superblock[-1].stop(summaries)]
            known = pages.summaries(ids[: superblock[-1].before(summaries)])
            blocks = [each.block(q_KGTD, ids, pages, wide.block) for each in superblock]
            use = _probed(found, blocks[-1], pages, ids)
            for each, kept in zip(superblock, choose(blocks, known, use, wide), strict=True):
                chosen.add(each, kept, ids)
        return chosen.done()

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
        found = estimator(settings.estimator)
        if isinstance(found, ProbingEstimator):  # has no last block to ask
            found = estimator(BLOCK)
        pages = _Pages(k_pools, summaries, q_HD.dtype, found)
        q_KGTD = _by_head(q_HD[None], pages.kv_heads, scale)
        return found.log_mass(q_KGTD, pages.summaries(page_ids))[:, :, 0].flatten(0, 1)

    def tail(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        chosen: Chosen,
        summaries: SummaryPool,
        scale: float,
        onto: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        o_THD = torch.zeros(q_THD.shape, dtype=torch.float32)
        lse_TH = torch.full(q_THD.shape[:2], -torch.inf)
        kv_heads = next(pool for pool in summaries.pools if len(pool)).shape[1]
        group = q_THD.shape[1] // kv_heads
        shape = blob.BlobShape(summaries.page_size, summaries.head_dim, q_THD.dtype)
        for item, (begin, count) in enumerate(chosen.dropped.tolist()):
            if not count:
                continue
            row, rows, *_ = queries.blocks[item // kv_heads].tolist()
            head = item % kv_heads
            cut = (slice(row, row + rows), slice(head * group, (head + 1) * group))
            ids = chosen.dropped_ids[begin : begin + count]
            found = gather(summaries.pools, summaries.slots_per_rank, ids)[:, head : head + 1]
            mean_k, mean_v = blob.means(found, shape)
            score = q_THD[cut].float() * scale @ mean_k[:, 0].T + torch.log(
                torch.tensor(float(summaries.page_size))
            )
            o_THD[cut], lse_TH[cut] = score.softmax(-1) @ mean_v[:, 0], score.logsumexp(-1)
        if onto is None:
            return o_THD, lse_TH
        for to, merged in zip(onto, merge_state(*onto, o_THD, lse_TH), strict=True):
            to.copy_(merged)
        return onto


def gather(pools: Sequence[Tensor], slots_per_rank: int, ids: Tensor) -> Tensor:
    """Pages of several ranks in the order of `ids` ``[n, ...]``."""
    ranks, slots = ids.long() // slots_per_rank, ids.long() % slots_per_rank
    some = next(pool for pool in pools if len(pool))
    out = some.new_empty((len(ids), *some.shape[1:]))
    for rank in torch.unique(ranks).tolist():
        mine = ranks == rank
        out[mine] = pools[rank][slots[mine]]
    return out


def _probed(found: Estimator, last: Block, pages: _Pages, ids: Tensor) -> Estimator:
    """The estimator for a superblock that ends with `last`, of pages `ids`."""
    if not isinstance(found, ProbingEstimator):
        return found
    size, tokens = pages.pool.page_size, last.start + last.q_KGTD.shape[2]
    counts = (tokens - torch.arange(len(ids)) * size).clamp(max=size)
    return found.probed(last.q_KGTD, pages.keys(ids), counts)


@dataclass(frozen=True)
class _Rows:
    """A query block: a row of `QueryBlocks.blocks`."""

    row: int
    rows: int
    position: int
    superblock: int
    entry: int
    kv_len: int

    def before(self, pool: SummaryPool) -> int:
        """Pages before it."""
        return self.position // pool.page_size

    def stop(self, pool: SummaryPool) -> int:
        """Pages up to its end."""
        return -(-(self.position + self.rows) // pool.page_size)

    def block(self, q_KGTD: Tensor, ids: Tensor, pages: _Pages, tokens: int) -> Block:
        pool = pages.pool
        own = pages.keys(ids[self.before(pool) : self.stop(pool)])
        counts = (self.rows - torch.arange(len(own)) * pool.page_size).clamp(max=pool.page_size)
        q = q_KGTD[:, :, self.row : self.row + self.rows]
        partial = own_block(q, own, own, counts)
        return Block(self.position, q, self.before(pool), tokens // pool.page_size, partial)


class _Pages:
    """What can be known of pages: from their summaries, or from their keys where these lack it."""

    def __init__(
        self, k_pools: Sequence[Tensor], pool: SummaryPool, dtype: torch.dtype, found: Estimator
    ) -> None:
        self.pool = pool
        self.kv_heads = int(next(k for k in k_pools if len(k)).shape[1])
        self._k_pools = k_pools
        self._needs = found.needs
        self._shape = blob.BlobShape(pool.page_size, pool.head_dim, dtype)

    def keys(self, ids: Tensor) -> Tensor:
        """fp32 ``[pages, kv_heads, page_size, head_dim]``."""
        return gather(self._k_pools, self.pool.slots_per_rank, ids).float()

    def summaries(self, ids: Tensor) -> PageSummaries:
        if self._needs <= IN_BLOB:
            found = gather(self.pool.pools, self.pool.slots_per_rank, ids)
            return blob.decode(found, self._shape)
        keys = self.keys(ids)
        return summarise(keys, keys, torch.full((len(ids),), self.pool.page_size), self._needs)


class _Lists:
    """Lists of pages, item by item, on their way to `Chosen`."""

    def __init__(self, pool: SummaryPool) -> None:
        self._pool = pool
        self._items: list[tuple[int, ...]] = []
        self._ids: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._dropped: list[tuple[int, int]] = []
        self._dropped_ids: list[Tensor] = []
        self._entries = self._dropped_entries = self._causal = 0

    def add(self, block: _Rows, kept_KN: Tensor, ids: Tensor) -> None:
        before, stop = block.before(self._pool), block.stop(self._pool)
        own = torch.arange(before, stop)
        for head, kept in enumerate(kept_KN):
            at = torch.cat((kept.nonzero()[:, 0], own))
            dropped = ids[:before][~kept]
            self._items.append(
                (block.row, block.rows, block.position, self._entries, len(at), block.kv_len)
                + (head, 1)
            )
            self._ids.append(ids[at])
            self._positions.append((at * self._pool.page_size).to(torch.int32))
            self._dropped.append((self._dropped_entries, len(dropped)))
            self._dropped_ids.append(dropped)
            self._entries += len(at)
            self._dropped_entries += len(dropped)
        self._causal += stop * len(kept_KN)

    def done(self) -> Chosen:
        nothing = torch.zeros(0, dtype=torch.int32)
        return Chosen(
            items=torch.tensor(self._items, dtype=torch.int32).reshape(-1, 8),
            page_ids=torch.cat((nothing, *self._ids)),
            page_positions=torch.cat((nothing, *self._positions)),
            dropped=torch.tensor(self._dropped, dtype=torch.int32).reshape(-1, 2),
            dropped_ids=torch.cat((nothing, *self._dropped_ids)),
            read_pairs=self._entries,
            causal_pairs=self._causal,
        )


def _superblocks(queries: QueryBlocks) -> Iterator[list[_Rows]]:
    """The blocks of each superblock, which stand together."""
    found: list[_Rows] = []
    for fields in queries.blocks.tolist():
        block = _Rows(*fields)
        if found and block.superblock != found[-1].superblock:
            yield found
            found = []
        found.append(block)
    if found:
        yield found


def _by_head(q_THD: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Scaled queries as ``[kv_heads, group, tokens, head_dim]``, a view where it can be."""
    q_KGTD: Tensor = q_THD.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) * scale
    return q_KGTD

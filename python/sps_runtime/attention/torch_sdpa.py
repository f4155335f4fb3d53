"""Partials by torch's own flash attention: what runs where no kernel package is installed.

Queries go in blocks; pages that every query of a block sees whole need no mask, the diagonal and
the edge of the window get one. torch's operator returns the log-sum-exp beside the output, which is
what makes it a partial. KV is gathered from its pages first, which the kernels avoid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.ops.kv_rows import decode, row_format
from sps_runtime.ops.merge_state import merge_state, merge_states

QUERY_BLOCK = 512


class TorchBackend:
    """`attention.backend.AttentionBackend` in plain torch, fp32 or bf16."""

    name = "torch"
    recordable = False

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
        tokens, heads, dim = q_THD.shape
        o_THD = q_THD.new_zeros(tokens, heads, dim, dtype=torch.float32)
        lse_TH = q_THD.new_full((tokens, heads), -torch.inf, dtype=torch.float32)
        for run in runs:
            for begin in range(0, run.count, QUERY_BLOCK):
                count = min(QUERY_BLOCK, run.count - begin)
                rows = slice(run.row + begin, run.row + begin + count)
                block = _Block(q_THD[rows], run, run.position + begin, scale, window, kv_heads)
                o_THD[rows], lse_TH[rows] = block.attend(pool)
        return Partial(o_THD, lse_TH)

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        o_THD = q_THD.new_zeros(q_THD.shape, dtype=torch.float32)
        lse_TH = q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32)
        group = q_THD.shape[1] // next(k for k in pool.k if k.numel()).shape[1]
        for row, count, position, begin, pages, kv_len, kv, kv_count in lists.items.tolist():
            cut = (slice(row, row + count), slice(kv * group, (kv + kv_count) * group))
            entries = slice(begin, begin + pages)
            ids, starts = lists.page_ids[entries], lists.page_positions[entries]
            run = QueryRun(0, count, position, ids, starts, kv_len)
            q = q_THD[cut].contiguous()
            heads = (kv, kv + kv_count)
            part = self.partial(q, [run], pool, scale=scale, window=window, kv_heads=heads)
            o_THD[cut], lse_TH[cut] = part.o, part.lse
        return Partial(o_THD, lse_TH)

    def refresh(self, lists: PageLists) -> bool:
        return True

    def form(self, lists: PageLists) -> str | None:
        return ""

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        out_THD.copy_(merge_states([(partial.o, partial.lse) for partial in partials])[0])


class _Block:
    """Some consecutive queries of a run."""

    def __init__(
        self,
        q_THD: Tensor,
        run: QueryRun,
        position: int,
        scale: float,
        window: int | None,
        kv_heads: tuple[int, int] | None,
    ) -> None:
        self.q_THD = q_THD
        self.run = run
        self.position = position
        self.last = position + q_THD.shape[0] - 1
        self.scale = scale
        self.window = window
        self.kv_heads = kv_heads

    def attend(self, pool: PagePool) -> tuple[Tensor, Tensor]:
        page, starts = pool.page_size, self.run.page_positions
        seen = starts <= min(self.last, self.run.kv_len - 1)
        whole = starts + page - 1 <= min(self.position, self.run.kv_len - 1)
        if self.window is not None:
            seen &= starts + page - 1 > self.position - self.window
            whole &= starts > self.last - self.window
        return merge_state(
            *self._segment(pool, seen & whole, masked=False),
            *self._segment(pool, seen & ~whole, masked=True),
        )

    def _segment(self, pool: PagePool, pages: Tensor, *, masked: bool) -> tuple[Tensor, Tensor]:
        """The partial over chosen pages. Query heads that share a KV head are folded into rows:
        ``[kv_heads, tokens * group, head_dim]``, so that K and V are never repeated."""
        tokens, heads, dim = self.q_THD.shape
        ids, starts = self.run.page_ids[pages], self.run.page_positions[pages]
        if not len(ids):
            empty = self.q_THD.new_zeros(tokens, heads, dim, dtype=torch.float32)
            return empty, empty.new_full((tokens, heads), -torch.inf)
        k_KSD, v_KSD = (
            decode(rows, row_format(rows, dim), self.q_THD.dtype)
            for rows in (
                _gather(side, pool.slots_per_rank, ids, self.kv_heads) for side in (pool.k, pool.v)
            )
        )
        mask = None
        visible = None
        if masked:
            keys = (
                _by_rank(starts, ids // pool.slots_per_rank)[:, None] + torch.arange(pool.page_size)
            ).flatten()
            exists = keys <= min(self.last, self.run.kv_len - 1)
            k_KSD, v_KSD, keys = k_KSD[:, exists], v_KSD[:, exists], keys[exists]
            visible = self._visible(keys).to(self.q_THD.device)
            mask = self.q_THD.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        group = heads // k_KSD.shape[0]
        q = (
            self.q_THD.view(tokens, -1, group, dim)
            .permute(1, 0, 2, 3)
            .reshape(1, -1, tokens * group, dim)
        )
        if mask is not None:
            mask = mask.repeat_interleave(group, dim=0)
        o, lse = _attention(q, k_KSD[None], v_KSD[None], mask, self.scale)
        o = o[0].view(-1, tokens, group, dim).permute(1, 0, 2, 3).reshape(tokens, heads, dim)
        lse = lse[0].reshape(-1, tokens, group).permute(1, 0, 2).reshape(tokens, heads)
        if visible is not None:
            # The operators report other values for a query that sees no key.
            nothing = ~visible.any(-1)
            lse = lse.masked_fill(nothing[:, None], -torch.inf)
            if o.device.type != "cpu":
                o = o.masked_fill(nothing[:, None, None], 0.0)
        return o, lse

    def _visible(self, keys_S: Tensor) -> Tensor:
        queries_T = torch.arange(self.position, self.last + 1)
        distance = queries_T[:, None] - keys_S[None, :]
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


def _by_rank(values: Tensor, ranks: Tensor) -> Tensor:
    """Reorder as `_gather` does: by rank, stable."""
    return values[torch.argsort(ranks, stable=True)]


def _gather(
    pools: Sequence[Tensor], slots_per_rank: int, ids: Tensor, kv_heads: tuple[int, int] | None
) -> Tensor:
    """``[kv_heads, tokens, row]`` of pages, ordered by rank and then as listed."""
    begin, end = kv_heads or (0, next(t for t in pools if t.numel()).shape[1])
    ranks = ids // slots_per_rank
    parts = [
        pools[rank][(ids[ranks == rank] % slots_per_rank).long(), begin:end]
        for rank in torch.unique(ranks).tolist()
    ]
    pages_nKBD = torch.cat(parts) if len(parts) > 1 else parts[0]
    return pages_nKBD.transpose(0, 1).flatten(1, 2)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o ``[1, heads, rows, dim]`` and the natural log-sum-exp ``[1, heads, rows]``."""
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
        return o, lse
    if mask is not None:  # rows of the bias begin at multiples of 16 bytes
        room = mask.new_empty(mask.shape[0], -(-mask.shape[1] // 16) * 16)
        mask = room[:, : mask.shape[1]].copy_(mask).expand(1, q.shape[1], -1, -1)
    o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, scale=scale
    )
    return o, lse[:, :, : q.shape[2]]

"""Shares of pages over tensors: the kernels of `page_scores`, some blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sps_runtime.ops.triton.page_scores import mass_kernel, share_kernel, total_kernel
from sps_runtime.ops.triton.pools import PoolTable

WORKSPACE_BYTES = 32 << 20
"""Of masses that wait for their rows' totals: what stays in an L2 cache of 40 to 50 MB."""
PAGES = 16
"""Of a program of masses: the least that a tensor core's product has of columns."""


@dataclass(frozen=True)
class ScoredBlocks:
    """Query blocks as the kernels take them.

    Attributes:
        table: int32 ``[blocks, 6]`` on the device, fields of `page_scores.FIELDS`.
        page_ids: int32 on the device.
        scored, before: the most tokens that a block scores, the most pages before one.
    """

    table: Tensor
    page_ids: Tensor
    scored: int
    before: int

    @property
    def width(self) -> int:
        """Columns that shares have."""
        return int(triton.next_power_of_2(max(PAGES, self.before)))

    @classmethod
    def of(
        cls, blocks: Tensor, page_ids: Tensor, *, page_size: int, block: int, rows: Tensor,
        device: torch.device,
    ) -> ScoredBlocks:  # fmt: skip
        """From `sparse.operators.QueryBlocks` on the host; a whole block i of `block` tokens scores
        rows[i] of them (0 for all), a shorter one all."""
        table = blocks.new_zeros((len(blocks), 6))
        table[:, 0], table[:, 1], table[:, 3] = blocks[:, 0], blocks[:, 1], blocks[:, 4]
        fewer = (blocks[:, 1] == block) & (rows > 0) & (rows < block)
        table[:, 2] = torch.where(fewer, rows.to(torch.int32), blocks[:, 1])
        table[:, 4] = blocks[:, 2] // page_size
        most = table.amax(0).tolist() if len(table) else [0] * 6
        return cls(
            table.to(device, non_blocking=True), page_ids.to(device, non_blocking=True),
            most[2], most[4],
        )  # fmt: skip


def page_shares(
    q_THD: Tensor,
    blocks: ScoredBlocks,
    summaries: PoolTable,
    k: PoolTable,
    slots_per_rank: int,
    *,
    scale: float,
) -> Tensor:
    """Each page's estimated share of the attention of each (block, KV head), item by item.

    Args:
        q_THD: the last dim contiguous, of the pools' dtype.
        summaries: uint8 ``[slots, kv_heads, nbytes]`` each.
        k: ``[slots, kv_heads, page_size, head_dim]`` each.

    Returns:
        fp32 ``[blocks * kv_heads, n]``, n a power of two and at least the pages before any block;
        only a block's own number of columns is written.
    """
    _, heads, _ = q_THD.shape
    kv_heads = k.base.shape[1]
    group, count = heads // kv_heads, len(blocks.table)
    width = blocks.width
    shares = q_THD.new_empty((count * kv_heads, width), dtype=torch.float32)
    if blocks.before == 0 or count == 0:
        return shares
    tile = min(_most_rows(q_THD), max(16, triton.next_power_of_2(blocks.scored * group)))
    deep = triton.cdiv(blocks.scored * group, tile) * tile
    at_once = max(1, WORKSPACE_BYTES // (4 * kv_heads * deep * width))
    masses = q_THD.new_empty((min(at_once, count) * kv_heads, deep, width), dtype=torch.float32)
    totals = masses.new_empty(masses.shape[:2])
    for first in range(0, count, at_once):
        table = blocks.table[first : first + at_once]
        items = len(table) * kv_heads
        _masses(q_THD, table, blocks, summaries, slots_per_rank, kv_heads, masses, tile, scale)
        page, dim = k.base.shape[2:]
        total_kernel[(deep // tile, items)](
            q_THD, table, blocks.page_ids, k.base, k.offsets, masses, totals,
            q_THD.stride(0), q_THD.stride(1), slots_per_rank, k.base.stride(0), k.base.stride(1),
            kv_heads, masses.stride(0), width, scale,
            GROUP=group, D=dim, PAGE=page, ROWS=tile, BLOCK_P=triton.next_power_of_2(page),
            BLOCK_D=max(16, triton.next_power_of_2(dim)), PAGES=min(128, width),
            num_warps=8 if q_THD.dtype == torch.float32 else 4,
        )  # fmt: skip
        share_kernel[(triton.cdiv(blocks.before, 64), items)](
            table, masses, totals, shares[first * kv_heads :], kv_heads, masses.stride(0), width,
            width, GROUP=group, ROWS=tile, PAGES=64,
        )  # fmt: skip
    return shares


def page_masses(
    q_HD: Tensor,
    page_ids: Tensor,
    summaries: PoolTable,
    slots_per_rank: int,
    *,
    kv_heads: int,
    page_size: int,
    scale: float,
) -> Tensor:
    """Estimated log masses of pages (int32 ids on q's device) for one query: fp32
    ``[heads, pages]``, natural log."""
    heads, pages = q_HD.shape[0], len(page_ids)
    group = heads // kv_heads
    row = torch.tensor([[0, 1, 1, 0, pages, 0]], dtype=torch.int32, device=q_HD.device)
    tile = max(16, triton.next_power_of_2(group))
    width = triton.next_power_of_2(max(PAGES, pages))
    masses = q_HD.new_empty((kv_heads, tile, width), dtype=torch.float32)
    if pages:
        blocks = ScoredBlocks(row, page_ids, 1, pages)
        _masses(
            q_HD[None], row, blocks, summaries, slots_per_rank, kv_heads, masses, tile, scale,
            page_size,
        )  # fmt: skip
    return masses[:, :group, :pages].reshape(heads, pages)


def _masses(
    q_THD: Tensor,
    table: Tensor,
    blocks: ScoredBlocks,
    summaries: PoolTable,
    slots_per_rank: int,
    kv_heads: int,
    masses: Tensor,
    tile: int,
    scale: float,
    page_size: int | None = None,
) -> None:
    _, heads, dim = q_THD.shape
    nbytes = summaries.base.shape[2]
    page = (nbytes - 4 * dim * q_THD.element_size()) * 4 // dim
    assert page_size in (None, page), "summaries of other pages"
    full = q_THD.dtype == torch.float32
    mass_kernel[
        triton.cdiv(blocks.before, PAGES), masses.shape[1] // tile, len(table) * kv_heads
    ](
        q_THD, table, blocks.page_ids, summaries.base, summaries.offsets, masses,
        q_THD.stride(0), q_THD.stride(1), slots_per_rank,
        summaries.base.stride(0), summaries.base.stride(1), kv_heads,
        masses.stride(0), masses.stride(1), scale,
        GROUP=heads // kv_heads, D=dim, PAGE=page, ROWS=tile, PAGES=PAGES,
        QUARTER=max(16, triton.next_power_of_2(dim // 4)), BLOCK_P=triton.next_power_of_2(page),
        KIND=tl.float32 if full else tl.float16, num_warps=8 if full else 4,
    )  # fmt: skip


def _most_rows(q_THD: Tensor) -> int:
    """Of a tile: fp32 is multiplied without tensor cores, from registers."""
    return 16 if q_THD.dtype == torch.float32 else 64

"""Choosing pages over tensors: the kernels of `page_choice`, and the lists that they come to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.ops.triton.page_choice import common_kernel, keep_kernel, list_kernel

CHUNK = 1024


@dataclass(frozen=True)
class Limits:
    """What `sparse.selection.SelectionSettings` says, in pages."""

    tau: float
    budget: float
    minimum: int
    sink: int
    window: int
    block_pages: int
    superblocks: bool

    def most(self, pages: Tensor, own: int) -> Tensor:
        """Pages that may be kept of so many before a block that has `own` itself."""
        allowed = torch.ceil(self.budget * (pages + own).double()).clamp_min(self.minimum)
        return (allowed - own).clamp(max=2**31 - 1).to(torch.int32)


@dataclass(frozen=True)
class ChosenPages:
    """Attributes: as in `sparse.operators.Chosen`, on the device; items are
    ``[blocks * kv_heads, 8]``."""

    items: Tensor
    page_ids: Tensor
    page_positions: Tensor
    dropped: Tensor
    dropped_ids: Tensor


def choose_pages(
    shares: Tensor, blocks: Tensor, page_ids: Tensor, limits: Limits, *, page_size: int,
    kv_heads: int,
) -> ChosenPages:  # fmt: skip
    """The lists of each (block, KV head).

    The host waits once, for the lengths of the lists.

    Args:
        shares: of `scores.page_shares`.
        blocks: int32 ``[n, 6]`` on the host, as in `sparse.operators.QueryBlocks`.
        page_ids: int32 on the device.
    """
    device, items = shares.device, len(blocks) * kv_heads
    table, members = _tables(blocks, limits, page_size)
    rows, width = table.to(device, non_blocking=True), shares.shape[1]
    keep = torch.empty((items, width), dtype=torch.uint8, device=device)
    counts = torch.empty(items, dtype=torch.int32, device=device)
    bounds = (limits.minimum, limits.sink, limits.window, limits.tau)
    every = limits.tau <= 0 and limits.budget >= 1
    kinds = {"NP": width, "BY_TAU": limits.tau > 0, "ALL": every, "num_warps": _warps(width)}
    common = keep
    if limits.superblocks and items:
        common = torch.empty((len(members) * kv_heads, width), dtype=torch.uint8, device=device)
        common_kernel[(len(members), kv_heads)](
            shares,
            rows,
            members.to(device, non_blocking=True),
            common,
            kv_heads,
            width,
            *bounds,
            **kinds,
        )
    if items:
        keep_kernel[(items,)](
            shares, rows, common, keep, counts, kv_heads, width, *bounds,
            NARROW=limits.superblocks, **kinds,
        )  # fmt: skip
    return _lists(blocks, rows, page_ids, keep, counts, page_size, kv_heads)


def _tables(blocks: Tensor, limits: Limits, page_size: int) -> tuple[Tensor, Tensor]:
    """A row of `page_choice.FIELDS` for each block; first block, blocks and most of each
    superblock."""
    before = blocks[:, 2] // page_size
    stop = -(-(blocks[:, 2] + blocks[:, 1]) // page_size)
    _, of, each = torch.unique_consecutive(blocks[:, 3], return_inverse=True, return_counts=True)
    first = each.cumsum(0) - each
    tokens = torch.zeros_like(each).index_add_(0, of, blocks[:, 1].long())
    wide = before[first]
    fields = (
        blocks[:, 4], before, stop - before, torch.full_like(before, limits.block_pages),
        limits.most(before, limits.block_pages), of, wide[of], (tokens == 1)[of],
    )  # fmt: skip
    table = torch.stack([field.to(torch.int32) for field in fields], 1)
    members = torch.stack((first, each, limits.most(wide, 0)), 1).to(torch.int32)
    return table, members


def _lists(
    blocks: Tensor,
    table: Tensor,
    page_ids: Tensor,
    keep: Tensor,
    counts: Tensor,
    page_size: int,
    kv_heads: int,
) -> ChosenPages:
    fields = table.repeat_interleave(kv_heads, 0)
    before, own = fields[:, 1], fields[:, 2]
    read, gone = counts + own, before - counts
    begins, gone_begins = read.cumsum(0) - read, gone.cumsum(0) - gone
    entries, dropped = torch.stack((read.sum(), gone.sum())).tolist()  # waits for the device
    made = [page_ids.new_empty(size) for size in (entries, entries, dropped)]
    if len(counts):
        list_kernel[(len(counts),)](
            table, page_ids, keep, begins, made[0], made[1], gone_begins, made[2], kv_heads,
            page_size, NP=keep.shape[1], CHUNK=min(CHUNK, keep.shape[1]),
        )  # fmt: skip
    of = blocks.to(counts.device).repeat_interleave(kv_heads, 0)
    heads = torch.arange(kv_heads, device=counts.device).repeat(len(blocks))
    columns = (of[:, 0], of[:, 1], of[:, 2], begins, read, of[:, 5], heads, torch.ones_like(heads))
    items = torch.stack([column.to(torch.int32) for column in columns], 1)
    spans = torch.stack((gone_begins, gone), 1).to(torch.int32)
    return ChosenPages(items, made[0], made[1], spans, made[2])


def _warps(width: int) -> int:
    """A ranking holds its pages in registers: 8 bytes each, and as many again to exchange."""
    return 4 if width <= 1024 else 8 if width <= 4096 else 16

"""From estimated masses to the pages that a query block reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["norm", "max", "mean"]


@dataclass(frozen=True)
class SelectionSettings:
    """How pages are chosen; part of the fidelity of what is written under it.

    Attributes:
        tau: the estimated share of a query block's attention that may be dropped; 0 keeps all.
        budget: at most this share of the pages up to the block (the always-kept ones included).
        minimum: at least this many pages, the block's own included.
        sink: pages always kept at the beginning.
        window: pages always kept just before the block.
        dispersed: every n-th page always kept; 0 for none.
        block: tokens of a query block, a multiple of the page; blocks begin at its multiples.
        fetch_block: tokens of a superblock, a multiple of the block, within which all blocks read
            the same pages of those before it, or fewer: what a rank fetches is bounded by budget
            times its superblocks, however many blocks they have. 0 for none.
        representatives: rows of a block that are scored, for each query head; 0 for all.
        end_representatives, end: the same in the last `end` tokens of a superblock.
        reduce: how rows and heads make one share of a page, and blocks one of a superblock:
            ``norm``, the root of the sum of squares, which one row's need moves, and rounding
            errors of many rows less than in ``max``, the largest; or ``mean`` over rows.
    """

    tau: float = 0.05
    budget: float = 1.0
    minimum: int = 8
    sink: int = 1
    window: int = 2
    dispersed: int = 0
    block: int = 64
    fetch_block: int = 0
    representatives: int = 0
    end_representatives: int = 0
    end: int = 0
    reduce: Reduce = "norm"

    def scored(self, position: int) -> int:
        """Rows that are scored of the block at a position; 0 for all."""
        left = self.fetch_block - position % self.fetch_block if self.fetch_block else self.end + 1
        return self.representatives if left > self.end else self.end_representatives


def representatives(q_KGTD: Tensor, count: int) -> Tensor:
    """Evenly spaced rows of a block, the last among them ``[kv_heads, group, count, head_dim]``."""
    return q_KGTD[:, :, representative_rows(q_KGTD.shape[2], count)]


def representative_rows(tokens: int, count: int) -> Tensor:
    """Which rows `representatives` takes; all where count is 0 or as large as the block."""
    if count <= 0 or count >= tokens:
        return torch.arange(tokens)
    return torch.arange(1, count + 1) * tokens // count - 1


def always_kept(pages: int, settings: SelectionSettings) -> Tensor:
    """Bool ``[pages]``: which of the pages before a block are kept without asking."""
    kept = torch.zeros(pages, dtype=torch.bool)
    kept[: settings.sink] = True
    kept[max(0, pages - settings.window) :] = True
    if settings.dispersed:
        kept[:: settings.dispersed] = True
    return kept


def page_shares(log_mass_KGRN: Tensor, own_lse_KGR: Tensor, reduce: Reduce = "norm") -> Tensor:
    """Each page's estimated share of the attention of a query block: fp32 ``[kv_heads, pages]``.

    Args:
        log_mass_KGRN: what an estimator says of the pages before the block.
        own_lse_KGR: exact log mass that each row finds in its own block, which lies on its rank.
    """
    rows, scored = log_mass_KGRN.shape[2], own_lse_KGR.shape[2]
    each = -(-scored // rows)
    padded = own_lse_KGR[:, :, torch.arange(rows * each).clamp_max(scored - 1)]
    own = padded.unflatten(2, (rows, each)).mean(-1)
    total = torch.logaddexp(own, log_mass_KGRN.logsumexp(-1))
    share = torch.exp(log_mass_KGRN - total[..., None]).flatten(1, 2)
    if reduce == "norm":
        norm: Tensor = torch.linalg.vector_norm(share, dim=1)
        return norm
    return share.amax(1) if reduce == "max" else share.mean(1)


def select(share_KN: Tensor, own_pages: int, settings: SelectionSettings) -> Tensor:
    """The smallest set of pages whose complement has an estimated share of at most tau.

    A pure function of the block's absolute place (through the number of pages before it), shares
    and settings. Of equal shares the earlier page goes first. Unless `reduce` is ``mean`` a dropped
    set's sum of shares bounds every row's.

    Args:
        share_KN: of `page_shares`, for the pages before the block.
        own_pages: pages of the block itself; always read, and counted by budget and minimum.

    Returns:
        bool ``[kv_heads, pages]``, True where the block reads the page.
    """
    heads, pages = share_KN.shape
    if settings.tau <= 0 and settings.budget >= 1:
        return ~share_KN.isneginf()
    always = always_kept(pages, settings)[None] & ~share_KN.isneginf()
    ranked = share_KN.masked_fill(always, torch.inf).sort(dim=-1, descending=True, stable=True)
    order, share = ranked.indices, ranked.values
    rest = share.masked_fill(share.isinf(), 0.0).flip(-1).cumsum(-1).flip(-1)
    wanted = (rest > settings.tau).sum(-1) if settings.tau > 0 else torch.full((heads,), pages)
    most = max(settings.minimum, math.ceil(settings.budget * (pages + own_pages))) - own_pages
    least = always.sum(-1).clamp_min(settings.minimum - own_pages)
    count = torch.maximum(wanted.clamp(max=most), least)
    kept = (torch.arange(pages)[None] < count[:, None]) & ~share.isneginf()
    return torch.zeros(heads, pages, dtype=torch.bool).scatter_(1, order, kept)


def narrow(shares: Sequence[Tensor], before: int, settings: SelectionSettings) -> list[Tensor]:
    """Give the blocks of a superblock one set of pages before it to choose from.

    A page's share for the superblock is the norm of its shares for the blocks; with another
    `reduce` the largest of them.

    Args:
        shares: ``[kv_heads, pages before the block]`` of each block, in order.
        before: pages before the superblock.

    Returns:
        The shares, -inf for the pages outside the common set; `select` never keeps those.
    """
    if before == 0:
        return list(shares)
    each = torch.stack([share[:, :before] for share in shares])
    norm = settings.reduce == "norm"
    common = select(torch.linalg.vector_norm(each, dim=0) if norm else each.amax(0), 0, settings)
    narrowed = [share.clone() for share in shares]
    for share in narrowed:
        share[:, :before].masked_fill_(~common, -torch.inf)
    return narrowed

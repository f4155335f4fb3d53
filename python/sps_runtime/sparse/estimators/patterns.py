"""Estimators of published prefill kernels: they sample rows, or diagonals, of all of q.K."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.sparse.summaries import PageSummaries


@dataclass(frozen=True)
class Antidiagonal:
    """XAttention (Xu et al. 2025): antidiagonals of stride x stride tiles stand for the tiles.

    A tile's score is the mean of q.k on its antidiagonal, of which every row and column has one.
    Rows must be all tokens of the block; a last tile that is not full repeats its last row.
    """

    stride: int = 8
    needs = frozenset({"keys_NKBD"})
    whole_blocks = True

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        s, keys = self.stride, pages.get("keys_NKBD")
        lack = -q_KGRD.shape[2] % s
        q = torch.cat((q_KGRD, q_KGRD[:, :, -1:].expand(-1, -1, lack, -1)), dim=2)
        q = q.unflatten(2, (-1, s)).flip(3).flatten(3) / s
        k = keys.unflatten(2, (-1, s)).flatten(3)
        tiles = torch.einsum("kgrx,nkcx->kgrnc", q, k)
        return tiles.logsumexp(-1) + math.log(s)


_OUTSIDE = 1e2
"""A log mass beside which that of a block's own page is nothing: shares are then of what is
attended to outside of it."""


@dataclass(frozen=True)
class Nothing:
    """The later a page, the better, whatever is asked: the sink and a window as wide as the budget
    (StreamingLLM's pattern, Xiao et al. 2024). What a task loses without any choice."""

    needs: frozenset[str] = frozenset()

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        later = torch.arange(1, pages.pages + 1, dtype=q_KGRD.dtype).log() + _OUTSIDE
        return later.expand(*q_KGRD.shape[:3], pages.pages)


@dataclass(frozen=True)
class RandomPages:
    """Pages that nothing chose: page sets of the budget's size for timing, and for nothing else."""

    needs: frozenset[str] = frozenset()

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        share = random_shares(q_KGRD.shape[0], pages.pages).log() + _OUTSIDE
        return share[:, None, None].expand(*q_KGRD.shape[:3], pages.pages)


def random_shares(kv_heads: int, before: int) -> Tensor:
    """What `RandomPages` says of the pages before a block ``[kv_heads, before]``, by their number
    alone."""
    seeded = torch.Generator().manual_seed(before)
    return torch.rand(kv_heads, before, generator=seeded, device="cpu")


@dataclass(frozen=True)
class VerticalSlash:
    """FlexPrefill's and MInference's pattern (Lai et al. 2025, Jiang et al. 2024): what the last
    query block attends to, as pages (verticals) and as distances (slashes), is taken for all.

    Attributes:
        vertical_KN: share of the last block's attention that each page of the sequence gets.
        slash_KN: the same by how many pages back it lies.
        slashes: whether the slashes count; without them it is the plain last-block probe.
    """

    vertical_KN: Tensor
    slash_KN: Tensor
    slashes: bool = True
    needs: frozenset[str] = frozenset()

    @classmethod
    def probe(
        cls, q_KGRD: Tensor, k_NKBD: Tensor, counts_N: Tensor, slashes: bool = True
    ) -> VerticalSlash:
        """From the last rows of the sequence (scaled) and all its pages; rows see one another."""
        each = torch.einsum("kgrd,nkbd->kgrnb", q_KGRD, k_NKBD.float())
        size, rows = k_NKBD.shape[2], q_KGRD.shape[2]
        total = int(counts_N.sum())
        hidden = (
            torch.arange(each.shape[3] * size)[None] > torch.arange(total - rows, total)[:, None]
        )
        each = each.masked_fill(hidden.view(rows, -1, size), -torch.inf)
        share = each.flatten(3).softmax(-1).unflatten(3, (-1, size)).sum(-1).mean((1, 2))
        return cls(share, share.flip(-1), slashes)

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        n, shape = pages.pages, (*q_KGRD.shape[:3], pages.pages)
        share = self.vertical_KN[:, :n]
        if self.slashes:
            share = share + self.slash_KN[:, 1 : n + 1].flip(-1)
        return (share.clamp_min(1e-12).log() + _OUTSIDE)[:, None, None].expand(shape)


@dataclass(frozen=True)
class LastBlockPattern:
    """`VerticalSlash` of the last block of each superblock."""

    needs: frozenset[str] = frozenset()

    def probed(self, q_KGRD: Tensor, k_NKBD: Tensor, counts_N: Tensor) -> VerticalSlash:
        return VerticalSlash.probe(q_KGRD, k_NKBD, counts_N)

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        """Before any probe all pages are alike."""
        return torch.zeros(*q_KGRD.shape[:3], pages.pages)

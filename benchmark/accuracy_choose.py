"""Which pages blocks of a superblock read: every estimator over one store of pages, in plain torch.

What `sparse.reference.choose` chooses, block by block and head by head, with products of matrices
that fit a cache. Shares are relative to each row's greatest score, so that no logarithm is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sps_runtime.sparse.selection import (
    Reduce,
    SelectionSettings,
    narrow,
    representative_rows,
    select,
)
from sps_runtime.types.attention import SparseSettings

PAGE = 64
LOG_PAGE = math.log(PAGE)
Mass = Literal["sum", "max"]


@dataclass(frozen=True)
class Setup:
    """A way to compute attention.

    Attributes:
        estimator: of `ESTIMATORS`, or ``dense`` or ``stride``.
        settings: what is kept, of how many rows; `superblock` of a block: no superblocks.
        mass: a page's is the sum over its keys, or its greatest term alone.
        reduce: as `SelectionSettings` has it.
        bits: of the sketch.
        dense_last: the last query block of prompt and answer reads everything.
        stride, ranks: of ``stride``; `shard`: tokens of a rank, by the document.
    """

    estimator: str
    settings: SparseSettings = field(default_factory=SparseSettings)
    mass: Mass = "sum"
    reduce: Reduce = "norm"
    bits: int = 2
    dense_last: bool = False
    stride: int = 4
    ranks: int = 8
    shard: int = 0

    @property
    def selection(self) -> SelectionSettings:
        s = self.settings
        return SelectionSettings(
            tau=s.tau,
            budget=s.budget,
            minimum=s.minimum,
            sink=s.sink,
            window=s.window,
            block=s.block,
            fetch_block=s.superblock if s.superblock > PAGE else 0,
            reduce=self.reduce,
        )


@dataclass
class LayerPages:
    """One layer's pages, bf16 as the engine keeps them, and what is known of them.

    Attributes:
        k, v: ``[pages, kv_heads, page, head_dim]``.
        seen_KSD: fp32, the keys as an estimator sees them (all of them, or of their sketch).
        mean_k_KND, mean_v_KND, low_KND, high_KND: fp32.
    """

    k: Tensor
    v: Tensor
    seen_KSD: Tensor
    mean_k_KND: Tensor
    mean_v_KND: Tensor
    low_KND: Tensor
    high_KND: Tensor

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    @classmethod
    def empty(cls, pages: int, heads: int, dim: int) -> LayerPages:
        pool = torch.zeros(2, pages, heads, PAGE, dim, dtype=torch.bfloat16)
        small = torch.zeros(4, heads, pages, dim)
        return cls(pool[0], pool[1], torch.zeros(heads, pages * PAGE, dim), *small)

    def write(self, start: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        at = torch.arange(start, start + len(k_TKD))
        page, row = at // PAGE, at % PAGE
        self.k[page, :, row], self.v[page, :, row] = k_TKD, v_TKD

    def summarise(self, first: int, end: int, setup: Setup) -> None:
        """Of full pages [first, end)."""
        k, v = self.k[first:end].float(), self.v[first:end].float()
        pages = slice(first, end)
        self.mean_k_KND[:, pages] = k.mean(2).bfloat16().float().transpose(0, 1)
        self.mean_v_KND[:, pages] = v.mean(2).bfloat16().float().transpose(0, 1)
        low, high = k.amin(2), k.amax(2)
        self.low_KND[:, pages], self.high_KND[:, pages] = low.transpose(0, 1), high.transpose(0, 1)
        if setup.estimator == "block":
            k = sketched(k, low, high, setup.bits)
        self.seen_KSD[:, first * PAGE : end * PAGE] = k.transpose(0, 1).flatten(1, 2)


def sketched(k_NKBD: Tensor, low_NKD: Tensor, high_NKD: Tensor, bits: int) -> Tensor:
    """Keys rounded to ``2 ** bits`` levels of each page's channel; low and step are bf16."""
    low = low_NKD.bfloat16().float()[:, :, None]
    step = ((high_NKD - low_NKD) / (2**bits - 1)).bfloat16().float()[:, :, None].clamp_min(1e-9)
    return low + ((k_NKBD - low) / step).round().clamp(0, 2**bits - 1) * step


@dataclass(frozen=True)
class SuperblockQueries:
    """Queries of a superblock, fp32 and scaled ``[kv_heads, group, tokens, head_dim]``."""

    start: int
    q_KGTD: Tensor

    @property
    def blocks(self) -> range:
        return range(0, self.q_KGTD.shape[2], PAGE)

    def rows(self, at: int, settings: SparseSettings) -> Tensor:
        """The rows of the block at `at` that are scored ``[kv_heads, group, rows, head_dim]``: all
        of one that is not full."""
        q = self.q_KGTD[:, :, at : at + PAGE]
        count = settings.scored_rows(self.start + at, self.q_KGTD.shape[2])
        return q[:, :, representative_rows(PAGE, count)] if q.shape[2] == PAGE else q


def choose(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> list[Tensor]:
    """bool ``[kv_heads, pages before the block]`` for each block."""
    selection, before = setup.selection, queries.start // PAGE
    heads = queries.q_KGTD.shape[0]
    shares = []
    probe = ESTIMATORS[setup.estimator](queries, pages, setup)
    for number, at in enumerate(queries.blocks):
        each = [probe(head, at, before + number) for head in range(heads)]
        shares.append(torch.stack(each))
    if selection.fetch_block:
        shares = narrow(shares, before, selection)
    return [select(share, 1, selection) for share in shares]


Probe = Callable[[int, int, int], Tensor]
"""(KV head, first row of a block, pages before it) -> share of each of those pages."""


def keys(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> Probe:
    """Every key as it is seen: ``block`` over the sketch, ``oracle`` over the keys themselves."""

    def share(head: int, at: int, before: int) -> Tensor:
        if not before:
            return torch.zeros(0)
        q = queries.rows(at, setup.settings)[head]
        score = q.flatten(0, 1) @ pages.seen_KSD[head, : before * PAGE].T
        return row_shares(
            score.unflatten(1, (before, PAGE)), own(queries, pages, head, at, q), setup
        )

    return share


def own(queries: SuperblockQueries, pages: LayerPages, head: int, at: int, q_GRD: Tensor) -> Tensor:
    """Exact log mass that each scored row finds in its own block: ``[group * rows]``."""
    first = queries.start + at
    count = min(PAGE, queries.q_KGTD.shape[2] - at)
    rows = representative_rows(count, q_GRD.shape[1] if q_GRD.shape[1] < count else 0)
    k = pages.k[first // PAGE, head, :count].float()
    score = (q_GRD @ k.T).masked_fill(torch.arange(count)[None] > rows[:, None], -torch.inf)
    return score.logsumexp(-1).flatten()


def row_shares(score_RNB: Tensor, own_R: Tensor, setup: Setup) -> Tensor:
    """Each page's share over rows: ``[pages]``; the scores are overwritten."""
    if setup.mass == "max":
        score_RNB = score_RNB.amax(-1, keepdim=True)
    top = torch.maximum(score_RNB.flatten(1).amax(1), own_R)
    mass = score_RNB.sub_(top[:, None, None]).exp_().sum(-1)
    total = mass.sum(1) + (own_R - top).exp()
    share = mass / total[:, None]
    return torch.linalg.vector_norm(share, dim=0) if setup.reduce == "norm" else share.amax(0)


def page_scores(
    score: Callable[[Tensor, LayerPages, int, int], Tensor],
) -> Callable[[SuperblockQueries, LayerPages, Setup], Probe]:
    """An estimator of one score a row and page, as log mass."""

    def estimator(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> Probe:
        def share(head: int, at: int, before: int) -> Tensor:
            q = queries.rows(at, setup.settings)[head]
            found = score(q.flatten(0, 1), pages, head, before) if before else q.new_zeros(1, 0)
            if not before:
                return found[0]
            return row_shares(found[..., None], own(queries, pages, head, at, q), setup)

        return share

    return estimator


def mean_score(q_RD: Tensor, pages: LayerPages, head: int, before: int) -> Tensor:
    return q_RD @ pages.mean_k_KND[head, :before].T + LOG_PAGE


def quest_score(q_RD: Tensor, pages: LayerPages, head: int, before: int) -> Tensor:
    """Quest's bound (Tang et al. 2024): the greatest q.k of any key in the page's box."""
    best = q_RD.clamp_min(0) @ pages.high_KND[head, :before].T
    return best + q_RD.clamp_max(0) @ pages.low_KND[head, :before].T + LOG_PAGE


def null(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> Probe:
    """Sink and window only: the latest pages that the budget pays for."""
    return lambda head, at, before: torch.arange(1.0, before + 1)


def vertical_slash(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> Probe:
    """What the superblock's last rows attend to, as pages and as distances, is taken for all its
    blocks (MInference, Jiang et al. 2024; FlexPrefill, Lai et al. 2025)."""
    q = queries.q_KGTD[:, :, -PAGE:]
    total = queries.start + queries.q_KGTD.shape[2]
    whole = -(-total // PAGE)
    k = pages.k[:whole].float().transpose(0, 1).flatten(1, 2)
    score = q.flatten(1, 2) @ k.transpose(1, 2)
    at = torch.arange(total - q.shape[2], total).repeat(q.shape[1])
    score.masked_fill_(torch.arange(whole * PAGE)[None] > at[:, None], -torch.inf)
    share = score.softmax(-1).unflatten(2, (whole, PAGE)).sum(-1).mean(1)
    slash = share.flip(-1)

    def of(head: int, at: int, before: int) -> Tensor:
        return share[head, :before] + slash[head, 1 : before + 1].flip(-1)

    return of


def antidiagonal(queries: SuperblockQueries, pages: LayerPages, setup: Setup) -> Probe:
    """XAttention (Xu et al. 2025): antidiagonals of 8 x 8 tiles stand for the tiles; a page's
    share is the sum over its tiles, the mean over the block's rows of tiles and the heads."""
    s = 8
    tokens = queries.start + queries.q_KGTD.shape[2]
    k = pages.k[: tokens // PAGE].float().transpose(0, 1).flatten(1, 2).unflatten(1, (-1, s))
    k = k.flatten(2)

    def of(head: int, at: int, before: int) -> Tensor:
        if not before:
            return torch.zeros(0)
        q = queries.q_KGTD[head, :, at : at + PAGE]
        q = torch.cat((q, q[:, -1:].expand(-1, -q.shape[1] % s, -1)), 1)
        q = q.unflatten(1, (-1, s)).flip(2).flatten(2).flatten(0, 1) / s
        share = (q @ k[head, : before * PAGE // s].T).softmax(-1)
        return share.unflatten(1, (before, -1)).sum(-1).mean(0)

    return of


ESTIMATORS: dict[str, Callable[[SuperblockQueries, LayerPages, Setup], Probe]] = {
    "block": keys,
    "oracle": keys,
    "mean": page_scores(mean_score),
    "quest": page_scores(quest_score),
    "vertical_slash": vertical_slash,
    "xattention": antidiagonal,
    "null": null,
}

"""Block-sparse attention as it should come out: plain torch, one query block after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sps_runtime.ops.merge_state import merge_state
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.selection import (
    SelectionSettings,
    narrow,
    page_shares,
    representative_rows,
    select,
)
from sps_runtime.sparse.summaries import PageSummaries, paged
from sps_runtime.sparse.tail import tail_partial


@dataclass
class SparseResult:
    """Attention of a chunk's rows.

    Attributes:
        o_THD, lse_TH: fp32.
        kept: for each query block, its absolute number and bool ``[kv_heads, pages before it]``.
    """

    o_THD: Tensor
    lse_TH: Tensor
    kept: list[tuple[int, Tensor]] = field(default_factory=list)


def sparse_attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    summaries: PageSummaries,
    estimator: Estimator | None,
    settings: SelectionSettings,
    *,
    start: int,
    scale: float,
    page_size: int = 64,
    tail: str = "mean",
) -> SparseResult:
    """Causal attention of rows ``start`` to ``start + tokens`` over pages that are selected.

    Args:
        q_THD: ``[tokens, heads, head_dim]`` of a chunk that begins at a multiple of the block (of
            the superblock, if any) and ends at one or with the prompt.
        k_SKD, v_SKD: ``[start + tokens, kv_heads, head_dim]``, all keys up to the chunk's end.
        summaries: of the pages before the chunk's last block at least.
        estimator: None keeps all pages.
        tail: a kind of `tail_partial`, or ``none``.

    Raises:
        ValueError: when the chunk does not begin with a query block or superblock.
    """
    wide = settings.fetch_block or settings.block
    if start % wide or settings.block % page_size or wide % settings.block:
        raise ValueError(f"a chunk at {start} does not begin with a block of {wide}")
    kv_heads = k_SKD.shape[1]
    q = q_THD.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) * scale
    k_pages, counts = paged(k_SKD.float(), page_size)
    v_pages, _ = paged(v_SKD.float(), page_size)
    end = start + q.shape[2]
    result = SparseResult(torch.empty_like(q), q.new_empty(q.shape[:3]))
    for first in range(start, end, wide):
        blocks = [
            Block.of(q[:, :, at - start :], at, k_pages, v_pages, counts, settings.block)
            for at in range(first, min(first + wide, end), settings.block)
        ]
        chosen = choose(blocks, summaries, estimator, settings)
        for block, kept in zip(blocks, chosen, strict=True):
            o, lse = block.attend(k_pages, v_pages, summaries, kept, tail)
            rows = slice(block.start - start, block.start - start + settings.block)
            result.o_THD[:, :, rows], result.lse_TH[:, :, rows] = o, lse
            result.kept.append((block.start // settings.block, kept))
    result.o_THD = result.o_THD.permute(2, 0, 1, 3).flatten(1, 2)
    result.lse_TH = result.lse_TH.permute(2, 0, 1).flatten(1)
    return result


@dataclass(frozen=True)
class Block:
    """A query block: its first position, scaled queries, pages before it, its own partial."""

    start: int
    q_KGTD: Tensor
    before: int
    own_pages: int
    own: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, q_KGTD: Tensor, start: int, k: Tensor, v: Tensor, counts: Tensor, tokens: int
    ) -> Block:
        """The block at `start`, from queries that begin there and all pages."""
        page_size, q = k.shape[2], q_KGTD[:, :, :tokens]
        own = slice(start // page_size, (start + tokens) // page_size)
        partial = own_block(q, k[own], v[own], counts[own])
        return cls(start, q, own.start, tokens // page_size, partial)

    def shares(
        self, summaries: PageSummaries, estimator: Estimator, settings: SelectionSettings
    ) -> Tensor:
        """What the estimator says of the pages before: ``[kv_heads, pages]``. A block with fewer
        rows than its size, which is a prompt's last, scores all of them."""
        tokens = self.q_KGTD.shape[2]
        scored = settings.scored(self.start) if tokens == settings.block else 0
        rows = representative_rows(tokens, scored)
        mass = estimator.log_mass(self.q_KGTD[:, :, rows], summaries.first(self.before))
        return page_shares(mass, self.own[1][:, :, rows], settings.reduce)

    def attend(
        self, k: Tensor, v: Tensor, summaries: PageSummaries, kept_KN: Tensor, tail: str
    ) -> tuple[Tensor, Tensor]:
        """The merged partials over own pages, kept ones and the tail."""
        o, lse = merge_state(*self.own, *kept_partial(self.q_KGTD, k, v, kept_KN))
        if tail == "none" or bool(kept_KN.all()):
            return o, lse
        pages = summaries.first(self.before)
        return merge_state(o, lse, *tail_partial(self.q_KGTD, pages, kept_KN, tail))


def choose(
    blocks: Sequence[Block],
    summaries: PageSummaries,
    estimator: Estimator | None,
    settings: SelectionSettings,
) -> list[Tensor]:
    """bool ``[kv_heads, pages before]`` for each block of a superblock: the pages that it reads.
    All of them for a superblock of a single token, which might as well be a generated one."""
    heads = blocks[0].q_KGTD.shape[0]
    if estimator is None or sum(block.q_KGTD.shape[2] for block in blocks) == 1:
        return [torch.ones(heads, block.before, dtype=torch.bool) for block in blocks]
    empty = torch.zeros(heads, 0)
    shares = [
        block.shares(summaries, estimator, settings) if block.before else empty for block in blocks
    ]
    if settings.fetch_block:
        shares = narrow(shares, blocks[0].before, settings)
    return [select(s, b.own_pages, settings) for s, b in zip(shares, blocks, strict=True)]


def own_block(
    q_KGTD: Tensor, k_NKBD: Tensor, v_NKBD: Tensor, counts_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The causal partial of a query block over its own pages."""
    tokens = int(counts_N.sum())
    k = k_NKBD.transpose(0, 1).flatten(1, 2)[:, :tokens]
    v = v_NKBD.transpose(0, 1).flatten(1, 2)[:, :tokens]
    score = torch.einsum("kgtd,ksd->kgts", q_KGTD, k)
    score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return torch.einsum("kgts,ksd->kgtd", score.softmax(-1), v), score.logsumexp(-1)


def kept_partial(
    q_KGTD: Tensor, k_NKBD: Tensor, v_NKBD: Tensor, kept_KN: Tensor
) -> tuple[Tensor, Tensor]:
    """The partial over kept pages, all of them full and before the block."""
    o, lse = torch.zeros_like(q_KGTD), q_KGTD.new_full(q_KGTD.shape[:3], -torch.inf)
    for head, kept in enumerate(kept_KN):
        at = kept.nonzero()[:, 0]
        if len(at):
            score = q_KGTD[head] @ k_NKBD[at, head].flatten(0, 1).T
            lse[head] = score.logsumexp(-1)
            o[head] = score.softmax(-1) @ v_NKBD[at, head].flatten(0, 1)
    return o, lse


def dropped_mass(q_KGTD: Tensor, own_lse_KGT: Tensor, k_NKBD: Tensor, kept_KN: Tensor) -> Tensor:
    """The true share of each row's attention that lies in pages not kept: fp32
    ``[kv_heads, group, tokens]``; what the audit measures."""
    mass = torch.einsum("kgtd,nkbd->kgtnb", q_KGTD, k_NKBD).logsumexp(-1)
    total = torch.logaddexp(own_lse_KGT, mass.logsumexp(-1))
    gone = mass.masked_fill(kept_KN[:, None, None], -torch.inf).logsumexp(-1)
    return torch.exp(gone - total)

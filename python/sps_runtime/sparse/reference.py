"""Block-sparse attention as it should come out: plain torch, one query block after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sps_runtime.ops.merge_state import merge_state
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.selection import (
    SelectionSettings,
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
        q_THD: ``[tokens, heads, head_dim]`` of a chunk that begins at a multiple of the block.
        k_SKD, v_SKD: ``[start + tokens, kv_heads, head_dim]``, all keys up to the chunk's end.
        summaries: of the pages before the chunk's last block at least.
        estimator: None keeps all pages.
        tail: a kind of `tail_partial`, or ``none``.

    Raises:
        ValueError: when the chunk does not begin with a query block.
    """
    if start % settings.block or settings.block % page_size:
        raise ValueError(f"a chunk at {start} does not begin with a block of {settings.block}")
    kv_heads = k_SKD.shape[1]
    q = q_THD.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) * scale
    k_pages, counts = paged(k_SKD.float(), page_size)
    v_pages, _ = paged(v_SKD.float(), page_size)
    result = SparseResult(torch.empty_like(q), q.new_empty(q.shape[:3]))
    for begin in range(start, start + q.shape[2], settings.block):
        rows = slice(begin - start, begin - start + settings.block)
        before, end = begin // page_size, (begin + settings.block) // page_size
        block = q[:, :, rows]
        own = own_block(block, k_pages[before:end], v_pages[before:end], counts[before:end])
        pages = summaries.first(before)
        kept = choose(block, own[1], pages, estimator, settings)
        o, lse = merge_state(*own, *kept_partial(block, k_pages, v_pages, kept))
        if tail != "none" and not bool(kept.all()):
            o, lse = merge_state(o, lse, *tail_partial(block, pages, kept, tail))
        result.o_THD[:, :, rows], result.lse_TH[:, :, rows] = o, lse
        result.kept.append((begin // settings.block, kept))
    result.o_THD = result.o_THD.permute(2, 0, 1, 3).flatten(1, 2)
    result.lse_TH = result.lse_TH.permute(2, 0, 1).flatten(1)
    return result


def choose(
    block_KGTD: Tensor,
    own_lse_KGT: Tensor,
    pages: PageSummaries,
    estimator: Estimator | None,
    settings: SelectionSettings,
) -> Tensor:
    """bool ``[kv_heads, pages]``: the pages before a query block that it reads."""
    if estimator is None or pages.pages == 0:
        return torch.ones(block_KGTD.shape[0], pages.pages, dtype=torch.bool)
    rows = representative_rows(block_KGTD.shape[2], settings.representatives)
    mass = estimator.log_mass(block_KGTD[:, :, rows], pages)
    share = page_shares(mass, own_lse_KGT[:, :, rows], settings.reduce)
    return select(share, settings.block // block_pages(settings, pages), settings)


def block_pages(settings: SelectionSettings, pages: PageSummaries) -> int:
    """Tokens of a page: pages before a block are full."""
    return int(pages.counts_N[0]) if pages.pages else settings.block


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

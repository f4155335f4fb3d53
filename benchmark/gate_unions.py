"""From page shares to sets, from sets to what a rank must fetch or route."""

from __future__ import annotations

import torch
from torch import Tensor

from sps_runtime.sparse.cover import greedy_cover, minimum_cover
from sps_runtime.sparse.selection import SelectionSettings, select

HEAD_DIM, VALUE_BYTES, PAGE = 64, 2, 64


def pooled(share_QN: Tensor, pages: int, largest: bool) -> Tensor:
    """Shares of query blocks of several pages: ``[blocks // pages, pages of the sequence]``."""
    whole = share_QN[: share_QN.shape[0] // pages * pages].unflatten(0, (-1, pages))
    return whole.amax(1) if largest else whole.mean(1)


def mass_sets(share_QN: Tensor, mass: float, pages: int = 1) -> Tensor:
    """Smallest sets of pages that hold a share of the mean mass, own pages included: bool, like
    `pooled`. The share is of the block's rows and of the query heads of one KV head together."""
    mean = pooled(share_QN, pages, largest=False)
    order = mean.sort(-1, descending=True)
    count = (order.values.cumsum(-1) < mass).sum(-1, keepdim=True) + 1
    chosen = torch.arange(mean.shape[1])[None] < count
    return torch.zeros_like(mean, dtype=torch.bool).scatter_(1, order.indices, chosen)


def budget_sets(share_QN: Tensor, budget: float, pages: int = 1) -> Tensor:
    """The pages of largest share within a budget of those before the block, always-kept ones
    included, and the block's own."""
    largest = pooled(share_QN, pages, largest=True)
    sets = torch.zeros_like(largest, dtype=torch.bool)
    settings = SelectionSettings(tau=0.0, budget=budget)
    for block in range(len(sets)):
        before = block * pages
        sets[block, before : before + pages] = True
        if before:
            sets[block, :before] = select(largest[block : block + 1, :before], 0, settings)[0]
    return sets


def needles_kept(sets_QN: Tensor, largest_QN: Tensor, pages: int = 1, least: float = 0.25) -> float:
    """Of pairs of a 64-token block and a page before its superblock with a row that gives the page
    more than `least` of its attention, the share in the sets."""
    sets = sets_QN.repeat_interleave(pages, 0)
    first = torch.arange(len(sets))[:, None] // pages * pages
    wanted = largest_QN[: len(sets)] > least
    wanted &= torch.arange(sets.shape[1])[None] < first
    return float((wanted & sets).sum()) / max(float(wanted.sum()), 1.0)


def density(sets_QN: Tensor, pages: int = 1) -> float:
    """Share of the causal (query block, page) pairs in the sets."""
    causal = torch.arange(1, len(sets_QN) + 1) * pages
    return float(sets_QN.sum()) / float(causal.sum())


def union_share(sets_QN: Tensor, ranks: int, pages: int = 1) -> float:
    """u: pages that ranks fetch over remote pages that causality lets them need, contiguous
    shards. Each rank holds a run of blocks and of their own pages."""
    fetched = needed = 0
    ends = [rank * len(sets_QN) // ranks for rank in range(ranks + 1)]
    for rank in range(1, ranks):
        rows = slice(ends[rank], ends[rank + 1])
        remote = ends[rank] * pages if ends[rank + 1] > ends[rank] else 0
        fetched += int(sets_QN[rows, :remote].any(0).sum())
        needed += remote
    return fetched / max(needed, 1)


def cover_share(
    sets_QN: Tensor, ranks: int, group: int, pages: int = 1, exact: bool = False
) -> float:
    """Bytes of the cheapest fetch-or-route plan over those of fetching all causal remote pages."""
    page_cost = 2.0 * PAGE * HEAD_DIM * VALUE_BYTES
    block_cost = pages * PAGE * group * (2.0 * HEAD_DIM * VALUE_BYTES + 4)
    plan = minimum_cover if exact else greedy_cover
    cost = needed = 0.0
    ends = [rank * len(sets_QN) // ranks for rank in range(ranks + 1)]
    for rank in range(1, ranks):
        rows = slice(ends[rank], ends[rank + 1])
        for owner in range(rank):
            columns = slice(ends[owner] * pages, ends[owner + 1] * pages)
            wanted = sets_QN[rows, columns]
            cost += plan(wanted, page_cost, block_cost).cost
            needed += wanted.shape[1] * page_cost
    return cost / needed

"""Fetch or route: the cheapest way to bring pages and query blocks of two ranks together.

A query block of one rank wants pages of another. Each wanted pair is served by fetching the page
or by routing the block to the page's owner, so a plan is a vertex cover of a bipartite graph, and
the cheapest is a minimum cut (Koenig 1931). On the complete graph it is the choice between pass-KV
and pass-Q.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cover:
    """A plan between two ranks for one KV head.

    Attributes:
        fetched_N: bool ``[pages]``, pages sent to the query blocks' rank.
        routed_Q: bool ``[blocks]``, query blocks sent to the pages' owner.
        cost: in the unit of the costs that it was made from.
    """

    fetched_N: Tensor
    routed_Q: Tensor
    cost: float


def greedy_cover(wanted_QN: Tensor, page_cost: float, block_cost: float) -> Cover:
    """A cover never dearer than the cheaper of fetching all and routing all.

    Blocks are routed in order of how many pages they want, as far as that pays, then single
    exchanges are made while they save: a block is routed when only it wants pages that cost more,
    and taken back when the pages it lacks cost less.

    Args:
        wanted_QN: bool ``[blocks, pages]``.
    """
    degree = wanted_QN.sum(1)
    order = torch.argsort(degree, descending=True, stable=True)
    # Pages still wanted once the first i blocks are routed, for every i.
    later = wanted_QN[order].flip(0).cumsum(0).flip(0) > 0
    unions = torch.cat((later.sum(1), torch.zeros(1, dtype=torch.int64)))
    costs = unions * page_cost + torch.arange(len(unions)) * block_cost
    routed = torch.zeros(len(order), dtype=torch.bool)
    routed[order[: int(costs[: int((degree > 0).sum()) + 1].argmin())]] = True
    _exchange(wanted_QN, routed, page_cost, block_cost)
    fetched = wanted_QN[~routed].any(0)
    cost = float(fetched.sum()) * page_cost + float(routed.sum()) * block_cost
    return Cover(fetched, routed, cost)


def _exchange(wanted_QN: Tensor, routed: Tensor, page_cost: float, block_cost: float) -> None:
    """Route or take back single blocks, in place, the best first, while it saves."""
    wanted = wanted_QN.long()
    for _ in range(len(routed)):
        users_N = wanted[~routed].sum(0)
        alone_Q = (wanted * (users_N == 1)).sum(1) * page_cost - block_cost
        lacking_Q = block_cost - (wanted * (users_N == 0)).sum(1) * page_cost
        saving = torch.where(routed, lacking_Q, alone_Q)
        best = int(saving.argmax())
        if saving[best] <= 1e-9 * block_cost:
            return
        routed[best] = ~routed[best]


def minimum_cover(wanted_QN: Tensor, page_cost: float, block_cost: float) -> Cover:
    """The cheapest cover, by maximum flow (Dinic 1970); for checks, not for steps."""
    blocks, pages = wanted_QN.shape
    flow = _Flow(blocks + pages + 2)
    source, sink = blocks + pages, blocks + pages + 1
    for block in range(blocks):
        flow.edge(source, block, block_cost)
    for page in range(pages):
        flow.edge(blocks + page, sink, page_cost)
    for block, page in wanted_QN.nonzero().tolist():
        flow.edge(block, blocks + page, float("inf"))
    cost = flow.maximum(source, sink)
    near = flow.levels(source)
    routed = torch.tensor([near[block] < 0 for block in range(blocks)], dtype=torch.bool)
    fetched = torch.tensor([near[blocks + page] >= 0 for page in range(pages)], dtype=torch.bool)
    return Cover(fetched, routed, cost)


class _Flow:
    """A network of edges in pairs, the second of a pair being the way back."""

    def __init__(self, nodes: int) -> None:
        self.out: list[list[int]] = [[] for _ in range(nodes)]
        self.to: list[int] = []
        self.room: list[float] = []

    def edge(self, start: int, end: int, capacity: float) -> None:
        for a, b, room in ((start, end, capacity), (end, start, 0.0)):
            self.out[a].append(len(self.to))
            self.to.append(b)
            self.room.append(room)

    def levels(self, source: int) -> list[int]:
        """Edges from the source to each node where there is room; -1 where it is not reached."""
        level = [-1] * len(self.out)
        level[source] = 0
        waiting = deque([source])
        while waiting:
            node = waiting.popleft()
            for edge in self.out[node]:
                if self.room[edge] > 1e-12 and level[self.to[edge]] < 0:
                    level[self.to[edge]] = level[node] + 1
                    waiting.append(self.to[edge])
        return level

    def maximum(self, source: int, sink: int) -> float:
        total = 0.0
        while (level := self.levels(source))[sink] >= 0:
            left = [list(edges) for edges in self.out]
            while (pushed := self._push(source, sink, level, left)) > 0:
                total += pushed
        return total

    def _push(self, source: int, sink: int, level: list[int], left: list[list[int]]) -> float:
        """Push along one path that goes up a level with every edge."""
        path: list[int] = []
        node = source
        while node != sink:
            while left[node]:
                edge = left[node][-1]
                if self.room[edge] > 1e-12 and level[self.to[edge]] == level[node] + 1:
                    break
                left[node].pop()
            if left[node]:
                path.append(left[node][-1])
                node = self.to[path[-1]]
            elif not path:
                return 0.0
            else:
                back = path.pop()
                node = self.to[back ^ 1]
                left[node].pop()
        amount = min(self.room[edge] for edge in path)
        for edge in path:
            self.room[edge] -= amount
            self.room[edge ^ 1] += amount
        return amount

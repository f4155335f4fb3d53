"""Which lists of pages begin with the same pages: relay decode's grouping, integers only.

Requests that decode behind a common prefix read the same pages. Read for each of them, a prefix of
d pages costs a group of m requests m d pages; read once for all their queries (Ye et al. 2024,
"Cascade Inference"; Juravsky et al. 2024, "Hydragen") it costs d, and each query's partial over it
is merged with the one over its own pages.

Lists form a trie by their leading pages. A node of it is a possible group: its members read its
pages once. Groups are disjoint; a node's members go together, or the groups below it stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReadCost:
    """Bytes that one layer reads and writes; what sharing is judged by.

    Attributes:
        page_bytes: K and V of a page.
        row_bytes: what a second partial of one query costs: written, moved and merged.
        least_bytes: all groups of a call together must save so much, or nothing is shared: the
            kernels that sharing adds cost as long as reading this.
    """

    page_bytes: int
    row_bytes: int = 0
    least_bytes: int = 0

    def saved(self, members: int, pages: int) -> int:
        """Bytes that so many lists save when they read so many pages once."""
        return (members - 1) * pages * self.page_bytes - members * self.row_bytes


@dataclass(frozen=True)
class SharedPrefix:
    """Lists that begin with the same pages.

    Attributes:
        members: indices of the lists, ascending; two at least.
        pages: how many of their first pages they read together; one at least.
        saved_bytes: by the cost they were chosen by; above 0.
    """

    members: tuple[int, ...]
    pages: int
    saved_bytes: int


def shared_prefixes(
    ids: Ints, begin: Ints, limit: Ints, cost: ReadCost, most: int | None = None
) -> list[SharedPrefix]:
    """The disjoint groups that save most bytes, those that save more first.

    Args:
        ids: page ids >= 0.
        begin, limit: list i's leading pages that may be shared are
            ``ids[begin[i] : begin[i] + limit[i]]``.
        most: groups at most; all that pay unless told.

    Returns:
        Nothing where all groups together save less than `cost.least_bytes`.
    """
    order, depth = _sorted_lists(ids, begin, limit)
    groups = [
        SharedPrefix(tuple(sorted(order[group.first : group.stop])), group.pages, group.saved)
        for group in _best_groups(depth, cost)
    ]
    groups.sort(key=lambda group: (-group.saved_bytes, group.members))
    groups = groups[:most]
    total = sum(group.saved_bytes for group in groups)
    return groups if groups and total >= cost.least_bytes else []


def _sorted_lists(ids: Ints, begin: Ints, limit: Ints) -> tuple[list[int], list[int]]:
    """Lists that share their first page with another, in lexicographic order, and how many leading
    pages each has in common with the one before it (0 for the first)."""
    some = np.flatnonzero(limit > 0)
    if not len(some):
        return [], []
    _, same, counts = np.unique(ids[begin[some]], return_inverse=True, return_counts=True)
    some = some[counts[same] > 1]
    lists = {int(i): ids[begin[i] : begin[i] + limit[i]] for i in some}
    # Big-endian bytes of equal width are in the order of the numbers.
    order = sorted(lists, key=lambda i: lists[i].astype(">u4").tobytes())
    depth = [0] + [_common(lists[a], lists[b]) for a, b in pairwise(order)]
    return order, depth[: len(order)]


def _common(a: Ints, b: Ints) -> int:
    """Leading entries that are equal."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


@dataclass(frozen=True)
class _Group:
    """Sorted lists [first, stop), which share `pages`."""

    first: int
    stop: int
    pages: int
    saved: int


@dataclass
class _Node:
    """A subtree of the trie: sorted lists from `first` on, what the groups below it save, and
    which."""

    pages: float
    first: int
    saved: int = 0
    groups: list[_Group] = field(default_factory=list)

    def take(self, child: _Node) -> None:
        self.saved += child.saved
        self.groups += child.groups

    def close(self, stop: int, cost: ReadCost) -> None:
        """No more lists come: one group of all of them, where that saves more."""
        if self.pages in (0, math.inf):
            return
        pages = int(self.pages)
        saved = cost.saved(stop - self.first, pages)
        if saved > self.saved:
            self.saved, self.groups = saved, [_Group(self.first, stop, pages, saved)]


def _best_groups(depth: list[int], cost: ReadCost) -> list[_Group]:
    """One pass over sorted lists with a stack of the subtrees that are open (as LCP-interval trees
    are walked: Abouelhoda, Kurtz and Ohlebusch 2004)."""
    root = _Node(0, 0)
    opened = [root]
    for row in range(len(depth)):
        done = _Node(math.inf, row)
        common = depth[row + 1] if row + 1 < len(depth) else 0
        while opened[-1].pages > common:
            top = opened.pop()
            top.take(done)
            top.close(row + 1, cost)
            done = top
        if opened[-1].pages < common:
            opened.append(_Node(common, done.first))
        opened[-1].take(done)
    return root.groups

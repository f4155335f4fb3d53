"""The slots of every SP rank's pool, and the one state each page is in."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from enum import IntEnum

from sps_runtime.kvcache.fence import Fence


class PageState(IntEnum):
    """What a page is.

    FREE: its slot may be handed out. IN_USE: it belongs to one sequence. CACHED: it belongs to the
    radix tree. QUARANTINED: nobody's, but a plan under way may still touch it.
    """

    FREE = 0
    IN_USE = 1
    CACHED = 2
    QUARANTINED = 3


class OutOfPages(Exception):
    """A rank's free list is too short."""


class PageAllocator:
    """Hands out pages. ``page_id = rank * pages_per_rank + slot``; TP peers use equal slots.

    Freed pages become free again through the fence: at once when no plan under way can touch
    them, else when the watermark passes the epoch they were freed with.

    The lowest free slot goes first: a sequence's pages lie side by side where they can, which
    memory reads faster than pages at random, and a pool touches no more memory than it must.
    """

    def __init__(self, ranks: int, pages_per_rank: int, fence: Fence) -> None:
        self.ranks = ranks
        self.pages_per_rank = pages_per_rank
        self._fence = fence
        self._states = bytearray(ranks * pages_per_rank)
        self._free = [  # a heap each; ascending is one
            list(range(rank * pages_per_rank, (rank + 1) * pages_per_rank)) for rank in range(ranks)
        ]
        self._quarantine: dict[int, list[int]] = {}
        self._quarantined = [0] * ranks

    @property
    def total(self) -> int:
        return len(self._states)

    def rank_of(self, page: int) -> int:
        return page // self.pages_per_rank

    def state(self, page: int) -> PageState:
        return PageState(self._states[page])

    def free_count(self, rank: int) -> int:
        return len(self._free[rank])

    def quarantined_count(self, rank: int) -> int:
        return self._quarantined[rank]

    def allocate(self, ranks: Sequence[int]) -> list[int]:
        """Return one page of each rank named in `ranks`, in that order, all or none.

        Raises:
            OutOfPages: a rank has fewer free pages than asked for.
        """
        for rank in set(ranks):
            if ranks.count(rank) > len(self._free[rank]):
                raise OutOfPages(f"rank {rank} has {len(self._free[rank])} free pages")
        pages = [heapq.heappop(self._free[rank]) for rank in ranks]
        for page in pages:
            self._move(page, PageState.FREE, PageState.IN_USE)
        return pages

    def cache(self, pages: Iterable[int]) -> None:
        """Give a sequence's pages to the radix tree."""
        for page in pages:
            self._move(page, PageState.IN_USE, PageState.CACHED)

    def free(self, pages: Iterable[int], held: PageState, epoch: int) -> None:
        """Free pages of a sequence or of the tree that plans up to `epoch` may still touch.

        Raises:
            ValueError: a page is not in the state `held`: freed twice, or not the caller's.
        """
        reusable = epoch <= self._fence.watermark
        for page in pages:
            self._move(page, held, PageState.FREE if reusable else PageState.QUARANTINED)
            rank = page // self.pages_per_rank
            if reusable:
                heapq.heappush(self._free[rank], page)
            else:
                self._quarantine.setdefault(epoch, []).append(page)
                self._quarantined[rank] += 1

    def reclaim(self) -> None:
        """Move quarantined pages that the watermark has passed to the free lists."""
        for epoch in [e for e in self._quarantine if e <= self._fence.watermark]:
            for page in self._quarantine.pop(epoch):
                self._move(page, PageState.QUARANTINED, PageState.FREE)
                rank = page // self.pages_per_rank
                heapq.heappush(self._free[rank], page)
                self._quarantined[rank] -= 1

    def pages_in(self, state: PageState) -> set[int]:
        """Every page in `state`, for checks and figures; O(pool)."""
        return {page for page, held in enumerate(self._states) if held == state}

    def check(self) -> None:
        """Raise AssertionError unless lists, counts and states agree and cover the pool."""
        free = [page for pages in self._free for page in pages]
        assert len(set(free)) == len(free), "a page is in the free lists twice"
        assert set(free) == self.pages_in(PageState.FREE), "free lists and states differ"
        for rank, pages in enumerate(self._free):
            assert all(self.rank_of(page) == rank for page in pages), "a page on a foreign list"
        waiting = [page for pages in self._quarantine.values() for page in pages]
        assert len(set(waiting)) == len(waiting), "a page is quarantined twice"
        assert set(waiting) == self.pages_in(PageState.QUARANTINED), "quarantine and states differ"
        for rank in range(self.ranks):
            held = sum(self.rank_of(page) == rank for page in waiting)
            assert held == self._quarantined[rank], "quarantine is miscounted"

    def _move(self, page: int, old: PageState, new: PageState) -> None:
        if self._states[page] != old:
            state = PageState(self._states[page]).name
            raise ValueError(f"page {page} is {state}, not {old.name}")
        self._states[page] = new

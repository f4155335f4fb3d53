"""The one map from a sequence's logical pages to page ids (docs/design.md, contract 2)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class PageTable:
    """The pages of one sequence, in order of position, and the ranks that own them.

    Attributes:
        pages: ``array('i')``; entry i is the page id of logical page i, that is of positions
            [i * page_size, (i + 1) * page_size).
        owned: pages per SP rank.
        owner_mask: bit r is set where rank r owns a page; kept up to date, so reading it is free.
    """

    __slots__ = ("_pages_per_rank", "owned", "owner_mask", "pages")

    def __init__(self, ranks: int, pages_per_rank: int) -> None:
        self.pages = array("i")
        self.owned = [0] * ranks
        self.owner_mask = 0
        self._pages_per_rank = pages_per_rank

    def extend(self, pages: Iterable[int]) -> None:
        """Append pages for the next logical pages."""
        for page in pages:
            self.pages.append(page)
            self._count(page, 1)

    def replace(self, index: int, page: int) -> int:
        """Let logical page `index` lie in `page`; return the page it lay in."""
        old = self.pages[index]
        self.pages[index] = page
        self._count(page, 1)
        self._count(old, -1)
        return old

    def owner(self, index: int) -> int:
        """The SP rank of logical page `index`."""
        return self.pages[index] // self._pages_per_rank

    def owners_from(self, index: int) -> int:
        """Mask of the ranks that own logical pages from `index` on."""
        mask = 0
        for page in self.pages[index:]:
            mask |= 1 << page // self._pages_per_rank
        return mask

    def packed(self, count: int) -> bytes:
        """The first `count` page ids as packed int32, as plans carry them."""
        return (self.pages if count == len(self.pages) else self.pages[:count]).tobytes()

    def _count(self, page: int, change: int) -> None:
        rank = page // self._pages_per_rank
        self.owned[rank] += change
        if self.owned[rank]:
            self.owner_mask |= 1 << rank
        else:
            self.owner_mask &= ~(1 << rank)


class Directory:
    """The page tables of all sequences, by handle. Written by the scheduler alone."""

    def __init__(self, ranks: int, pages_per_rank: int) -> None:
        self._ranks = ranks
        self._pages_per_rank = pages_per_rank
        self._tables: dict[int, PageTable] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, handle: int) -> PageTable:
        return self._tables[handle]

    def open(self, handle: int) -> PageTable:
        """Start an empty table. Raises ValueError when the handle is in use."""
        if handle in self._tables:
            raise ValueError(f"sequence {handle} has a page table already")
        table = PageTable(self._ranks, self._pages_per_rank)
        self._tables[handle] = table
        return table

    def close(self, handle: int) -> PageTable:
        """Forget a sequence; return its last table. Raises KeyError when there is none."""
        return self._tables.pop(handle)

    def tables(self) -> dict[int, PageTable]:
        """A snapshot, for checks."""
        return dict(self._tables)

    def check(self) -> None:
        """Raise AssertionError unless every table's owner counts are those of its pages."""
        for handle, table in self._tables.items():
            owned = [0] * self._ranks
            for page in table.pages:
                owned[page // self._pages_per_rank] += 1
            assert owned == table.owned, f"sequence {handle} miscounts its owners"
            mask = sum(1 << rank for rank, count in enumerate(owned) if count)
            assert mask == table.owner_mask, f"sequence {handle} has a wrong owner mask"
            assert len(set(table.pages)) == len(table.pages), f"sequence {handle} repeats a page"

"""From lists of pages to calls of FlashInfer: arrays of integers only.

A call's requests read one pool and share one mask. FlashInfer aligns a causal mask with the end of
a request's keys: row i of n sees the first ``keys - n + i + 1`` of them, wherever they came from.
So a request may leave out any page that all its rows would see, but must hold every page between
its first row's and its last row's position, and none after. Where a list is not like that (pages of
one rank among queries of all of them) its rows are cut where pages begin to be missing.

Every row of a request sees a key: FlashInfer's masked scores are -inf in 0.7 and -5e4 in 0.6, and
neither is let in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

MOST_REQUESTS = 16384
"""Of a call: FlashInfer keeps lengths of 32,768."""


@dataclass(frozen=True)
class Items:
    """Lists as arrays: item i's rows attend to `pages` [begin[i], begin[i] + pages[i]).

    Attributes:
        row, count, position, kv_len: as in `QueryRun`.
        begin, pages: of its entries.
        ids, positions: of the entries, in any order.
    """

    row: Ints
    count: Ints
    position: Ints
    kv_len: Ints
    begin: Ints
    pages: Ints
    ids: Ints
    positions: Ints

    def __len__(self) -> int:
        return len(self.row)

    def entries_of(self) -> tuple[Ints, Ints]:
        """(item, place in `ids`) of all entries, item by item."""
        item = np.repeat(np.arange(len(self)), self.pages)
        first = np.cumsum(self.pages) - self.pages
        return item, np.arange(len(item)) - np.repeat(first - self.begin, self.pages)

    def take(self, which: npt.NDArray[np.bool_]) -> Items:
        """Some of the items; entries stay."""
        names = ("row", "count", "position", "kv_len", "begin", "pages")
        return replace(self, **{name: getattr(self, name)[which] for name in names})


@dataclass(frozen=True)
class Call:
    """What one wrapper is planned with.

    Attributes:
        pool: which pool.
        kind: ``decode``: one row each; ``causal``; ``whole``: every row sees every key; ``shared``:
            likewise, and its rows may be in another call of the same pool.
        window: whether the sliding window cuts off keys.
        rows: int64, the query tensor's rows in the order of requests; None for all, in order.
        qo_indptr, kv_indptr: int32 ``[requests + 1]``.
        indices: int32 slots of pages.
        last_page_len: int32 ``[requests]``, 1 to page_size.
        fillers: so many of the last rows are there for the call's shape alone.
    """

    pool: int
    kind: str
    window: bool
    rows: Ints | None
    qo_indptr: Int32s
    kv_indptr: Int32s
    indices: Int32s
    last_page_len: Int32s
    fillers: int = 0

    @property
    def requests(self) -> int:
        return len(self.last_page_len)

    @property
    def tokens(self) -> int:
        """Query rows."""
        return int(self.qo_indptr[-1])


@dataclass(frozen=True)
class Calls:
    """Attributes:
    calls: what FlashInfer computes.
    others: of each pool, items whose windows it cannot express: keys have gaps within them.
    """

    calls: tuple[Call, ...]
    others: tuple[Items, ...] = ()


def plan_calls(
    items: Items, rows: int, page_size: int, slots: int, window: int | None = None
) -> Calls:
    """Calls that together attend to all lists; a row in several of them is to be merged.

    Args:
        rows: of the query tensor.
        slots: of a pool: page id = pool * slots + slot.
        window: keys at positions <= query position - window are not seen.
    """
    calls: list[Call] = []
    left: list[Items] = []
    item, place = items.entries_of()
    pools = np.unique(items.ids[place] // slots)
    for pool in pools.tolist():
        found = _Pool(items, item, place, pool, page_size, slots, window)
        found.sort()
        calls += found.calls(rows)
        if found.left:
            left.append(_join(found.left))
    return Calls(tuple(calls), tuple(left))


class _Pool:
    """The part of lists that lies in one pool, sorted by position, without what no row sees."""

    def __init__(
        self,
        items: Items,
        item: Ints,
        place: Ints,
        pool: int,
        page_size: int,
        slots: int,
        window: int | None,
    ) -> None:
        ids, starts = items.ids[place], items.positions[place]
        stop = np.minimum(items.position + items.count, items.kv_len)
        seen = (ids // slots == pool) & (starts < stop[item])
        if window is not None:
            seen &= starts + page_size > items.position[item] - window + 1
        item, ids, starts = item[seen], ids[seen], starts[seen]
        order = np.lexsort((starts, item))
        self._item, self._ids, self._starts = item[order], ids[order], starts[order]
        counts = np.bincount(self._item, minlength=len(items))
        begin = np.cumsum(counts) - counts
        parts = replace(items, begin=begin, pages=counts, ids=self._ids, positions=self._starts)
        self._items = parts.take(counts > 0)
        self._pool, self._page, self._slots, self._window = pool, page_size, slots, window
        self._sorted: dict[tuple[str, bool], list[Items]] = {}
        self.left: list[Items] = []

    def sort(self) -> None:
        """Tell items apart by the mask that they need; cut those that need several."""
        kind, bound = self._kinds(self._items)
        odd = kind == _ODD
        self._put(self._items.take(~odd), kind[~odd], bound[~odd])
        if odd.any():
            cut = _join(list(self._cut(self._items.take(odd))))
            kind, bound = self._kinds(cut)
            if (kind == _ODD).any():
                raise ValueError("rows that were cut still need several masks")
            self._put(cut, kind, bound)

    def calls(self, rows: int) -> Iterator[Call]:
        """Calls over what was sorted; single rows, which need no mask, go where a call is made
        anyway."""
        for window in (False, True):
            causal = self._sorted.pop(("causal", window), [])
            single = self._sorted.pop(("decode", window), [])
            if causal and single:
                causal, single = causal + single, []
            whole = self._sorted.pop(("whole", window), [])
            for kind, parts in (("causal", causal), ("decode", single), ("whole", whole)):
                if parts:
                    yield from self._calls(_join(parts), kind, window, rows)

    def _put(self, items: Items, kind: Ints, bound: npt.NDArray[np.bool_]) -> None:
        for number, name in enumerate(_KINDS):
            for window in (False, True):
                which = (kind == number) & (bound == window)
                if not which.any():
                    continue
                found = items.take(which)
                if name == "other":
                    self.left.append(_with_ids(found))
                else:
                    self._sorted.setdefault((name, window), []).append(found)

    def _kinds(self, items: Items) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Of each item its kind, and whether its call is told the window."""
        page, stop = self._page, items.position + items.count
        item, place = items.entries_of()
        starts = items.positions[place]
        # A page is open where some row does not see all of it.
        opened = starts + page > items.position[item] + 1
        opens = np.bincount(item[opened], minlength=len(items))
        first = np.full(len(items), np.iinfo(np.int64).max)
        np.minimum.at(first, item[opened], starts[opened])
        last = items.positions[items.begin + items.pages - 1]
        covered = (first <= items.position) & (last + page >= stop) & (stop <= items.kv_len)
        covered &= (last - first) // page + 1 == opens
        beyond = items.kv_len <= items.position + 1  # all keys there are, for every row
        whole = (opens == 0) | beyond
        kind = np.full(len(items), _ODD)
        kind[covered] = _CAUSAL
        kind[whole] = _WHOLE
        kind[items.count == 1] = _DECODE
        bound = np.zeros(len(items), dtype=np.bool_)
        if self._window is None:
            return kind, bound
        begin = items.positions[items.begin]
        bound = begin <= stop - 1 - self._window
        contiguous = (last - begin) // page + 1 == items.pages
        ends = (last + page >= stop) & (stop <= items.kv_len)
        kind[bound & (kind != _ODD) & ~(contiguous & ends)] = _OTHER
        # Gaps only make keys look nearer, so a window that binds none of an item's rows does not
        # when it is told: items go together, and calls stay the same from step to step.
        return kind, np.ones(len(items), dtype=np.bool_)

    def _cut(self, items: Items) -> Iterator[Items]:
        """Items with rows between which pages begin, or cease, to be missing."""
        page = self._page
        for i in range(len(items)):
            low, high = int(items.position[i]), int(items.position[i] + items.count[i])
            begin, kv_len = int(items.begin[i]), int(items.kv_len[i])
            starts = items.positions[begin : begin + int(items.pages[i])]
            near = starts[starts + page > low]
            cuts = {low, high, kv_len}
            breaks = np.flatnonzero(np.diff(near) != page) + 1
            for group in np.split(near, breaks):
                if len(group):
                    cuts |= {int(group[0]), int(group[-1]) + page}
            edges = sorted(cut for cut in cuts if low <= cut <= high)
            for a, b in pairwise(edges):
                seen = int((starts < min(b, kv_len)).sum())
                first = 0
                if self._window is not None:
                    first = int((starts + page <= a - self._window + 1).sum())
                if seen > first:
                    yield _one(items, i, a, b, first, seen)

    def _calls(self, items: Items, kind: str, window: bool, rows: int) -> Iterator[Call]:
        order = np.argsort(items.row, kind="stable")
        for begin in range(0, len(order), MOST_REQUESTS):
            some = order[begin : begin + MOST_REQUESTS]
            yield self._call(_at(items, some), kind, window, rows)

    def _call(self, items: Items, kind: str, window: bool, rows: int) -> Call:
        _, place = items.entries_of()
        stop = np.minimum(items.position + items.count, items.kv_len)
        last = items.positions[items.begin + items.pages - 1]
        index = np.repeat(items.row - (np.cumsum(items.count) - items.count), items.count)
        index = index + np.arange(len(index))
        everything = len(index) == rows and bool((index == np.arange(rows)).all())
        return Call(
            pool=self._pool,
            kind=kind,
            window=window,
            rows=None if everything else index,
            qo_indptr=_indptr(items.count),
            kv_indptr=_indptr(items.pages),
            indices=(items.ids[place] % self._slots).astype(np.int32),
            last_page_len=np.minimum(stop - last, self._page).astype(np.int32),
        )


_KINDS = ("decode", "causal", "whole", "other")
_DECODE, _CAUSAL, _WHOLE, _OTHER, _ODD = range(5)


def _indptr(counts: Ints) -> Int32s:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _at(items: Items, index: Ints) -> Items:
    names = ("row", "count", "position", "kv_len", "begin", "pages")
    return replace(items, **{name: getattr(items, name)[index] for name in names})


def _one(items: Items, i: int, a: int, b: int, first: int, seen: int) -> Items:
    """Rows at positions [a, b) of an item, over its pages [first, seen)."""
    part = _at(items, np.array([i]))
    return replace(
        part,
        row=part.row + a - part.position,
        count=np.array([b - a]),
        position=np.array([a]),
        begin=part.begin + first,
        pages=np.array([seen - first]),
    )


def _join(parts: list[Items]) -> Items:
    """Items over the same entries, or over entries of their own, one after another."""
    if len(parts) == 1:
        return parts[0]
    shared = all(part.ids is parts[0].ids for part in parts)
    if not shared:
        parts = [_with_ids(part) for part in parts]
    sizes = [0 if shared else len(part.ids) for part in parts]
    offsets = np.cumsum(sizes) - sizes
    return Items(
        row=np.concatenate([part.row for part in parts]),
        count=np.concatenate([part.count for part in parts]),
        position=np.concatenate([part.position for part in parts]),
        kv_len=np.concatenate([part.kv_len for part in parts]),
        begin=np.concatenate([p.begin + at for p, at in zip(parts, offsets, strict=True)]),
        pages=np.concatenate([part.pages for part in parts]),
        ids=parts[0].ids if shared else np.concatenate([part.ids for part in parts]),
        positions=(
            parts[0].positions if shared else np.concatenate([part.positions for part in parts])
        ),
    )


def _with_ids(items: Items) -> Items:
    """The same with entries of its own only."""
    _, place = items.entries_of()
    return replace(
        items,
        begin=np.cumsum(items.pages) - items.pages,
        ids=items.ids[place],
        positions=items.positions[place],
    )

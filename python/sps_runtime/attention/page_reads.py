"""Which queries read which pages: from a layout to lists of `QueryRun`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.attention.backend import QueryRun
from sps_runtime.attention.shard_layout import Ints, Runs, ShardLayout
from sps_runtime.ops.devices import upload

Mask = npt.NDArray[np.bool_]


def page_bounds(layout: ShardLayout, runs: Runs, window: int | None) -> tuple[Ints, Ints]:
    """[lo, hi) into the layout's page table of the pages that each run's queries may see: none that
    a causal mask or the window discards for all of them."""
    first = layout.pages.first[runs.sequence]
    hi = first + (runs.position + runs.count - 1) // layout.page_size + 1
    if window is None:
        return first, hi
    return first + np.maximum(runs.position - window + 1, 0) // layout.page_size, hi


def needed(layout: ShardLayout, runs: Runs, window: int | None) -> Mask:
    """Which pages of the table at least one of the runs may see."""
    lo, hi = page_bounds(layout, runs, window)
    change = np.zeros(len(layout.pages.ids) + 1, dtype=np.int64)
    np.add.at(change, lo, 1)
    np.add.at(change, hi, -1)
    return np.cumsum(change[:-1]) > 0


@dataclass(frozen=True)
class Pieces:
    """The parts of runs that see some of a set of pages.

    Attributes:
        runs: cut to the rows from the first page on and, with a window, up to where the last page
            leaves it; runs that see nothing are gone.
        begin, end: each piece's pages, as a range of the set.
    """

    runs: Runs
    begin: Ints
    end: Ints

    def rows(self) -> Ints:
        """All rows of the pieces, in order."""
        return ranges(self.runs.row, self.runs.count)


def cut_pieces(layout: ShardLayout, runs: Runs, index: Ints, window: int | None) -> Pieces:
    """The parts of `runs` that see pages `index` (ascending places in the page table)."""
    pages = layout.pages
    lo, hi = page_bounds(layout, runs, window)
    begin, end = np.searchsorted(index, lo), np.searchsorted(index, hi)
    some = end > begin
    runs, begin, end = runs.take(some), begin[some], end[some]
    position = np.maximum(runs.position, pages.positions[index[begin]])
    stop = runs.position + runs.count
    if window is not None:
        last = index[end - 1]
        stop = np.minimum(stop, pages.positions[last] + pages.tokens[last] - 1 + window)
    row = runs.row + position - runs.position
    some = stop > position
    cut = Runs(runs.sequence, row, stop - position, position).take(some)
    return Pieces(cut, begin[some], end[some])


def query_runs(
    layout: ShardLayout,
    pieces: Pieces,
    index: Ints,
    *,
    page_ids: npt.NDArray[np.int32] | None = None,
    rows: Ints | None = None,
) -> list[QueryRun]:
    """The backend's view of pieces.

    Args:
        index: the set of pages that the pieces were cut for.
        page_ids: int32 ids of `index`'s pages where these are not the table's own (staged copies).
        rows: first row of each piece where these are not its own (rows that were gathered).
    """
    ids = torch.from_numpy(layout.pages.ids[index] if page_ids is None else page_ids)
    positions = torch.from_numpy(layout.pages.positions[index])
    lengths = layout.lengths[pieces.runs.sequence]
    first = pieces.runs.row if rows is None else rows
    return [
        QueryRun(row, count, position, ids[begin:end], positions[begin:end], length)
        for row, count, position, begin, end, length in zip(
            first.tolist(),
            pieces.runs.count.tolist(),
            pieces.runs.position.tolist(),
            pieces.begin.tolist(),
            pieces.end.tolist(),
            lengths.tolist(),
            strict=True,
        )
    ]


def packed_rows(pieces: Pieces, offset: int) -> Ints:
    """First row of each piece once all pieces' rows are laid end to end from `offset`."""
    return offset + np.cumsum(pieces.runs.count) - pieces.runs.count


def ranges(first: Ints, count: Ints) -> Ints:
    """[first[0], ... first[0] + count[0] - 1, first[1], ...]."""
    before = np.cumsum(count) - count
    rows: Ints = np.arange(int(count.sum())) + np.repeat(first - before, count)
    return rows


class RowSet:
    """Some of a tensor's rows.

    Args:
        rows: distinct, ascending.
        total: rows of the tensor.

    Attributes:
        count: rows in the set.
        index: int64 rows; None for all of them.
    """

    def __init__(self, rows: Ints, total: int) -> None:
        self.count = len(rows)
        self.index = None if self.count == total else torch.from_numpy(rows)

    def take(self, x: Tensor) -> Tensor:
        """These rows of x; x itself where they are all of them."""
        index = self.on(x.device)
        return x if index is None else x[index]

    def on(self, device: torch.device) -> Tensor | None:
        """`index` on a device; it goes there once."""
        if self.index is not None and self.index.device != device:
            self.index = upload(self.index.cpu().numpy(), device)
        return self.index

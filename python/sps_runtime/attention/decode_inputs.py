"""What attention reads in a step of one new token a sequence, in arrays that stay: later steps of
the same shape write other values into them, so that a recording of the step can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sps_runtime.attention.backend import PageLists
from sps_runtime.attention.shard_layout import ShardLayout

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class _Lists:
    """Page lists of all rows for one window."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.items = np.zeros((rows, 8), dtype=np.int32)
        self.page_ids = np.zeros(capacity, dtype=np.int32)
        self.page_positions = np.zeros(capacity, dtype=np.int32)
        self.remote_tokens = 0
        arrays = (self.items, self.page_ids, self.page_positions)
        self.pages = PageLists(*(torch.from_numpy(array) for array in arrays), complete=True)


class DecodeInputs:
    """Arrays of `rows` rows; row i is the new token of the plan's sequence i.

    Args:
        rows: sequences of the step.
        capacity: pages of all of them together, at most.
        kv_heads: of the TP slice.
        readers: for each SP rank, the member of the group that attends to its pages.
        member: this rank's index in the group.
        sp_rank: this SP rank.

    Attributes:
        tokens_T, positions_T: int64 ``[rows]``.
        slots_T, offsets_T: int32 ``[rows]`` where this rank writes the row's K and V; slot -1 where
            another rank does.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        *,
        kv_heads: int,
        readers: Sequence[int],
        member: int,
        sp_rank: int,
    ) -> None:
        self.rows, self.capacity = rows, capacity
        self._kv_heads = kv_heads
        self._readers = np.asarray(readers)
        self._member, self._sp_rank = member, sp_rank
        self._tokens = np.zeros(rows, dtype=np.int64)
        self._positions = np.zeros(rows, dtype=np.int64)
        self._slots = np.full(rows, -1, dtype=np.int32)
        self._offsets = np.zeros(rows, dtype=np.int32)
        self.tokens_T = torch.from_numpy(self._tokens)
        self.positions_T = torch.from_numpy(self._positions)
        self.slots_T = torch.from_numpy(self._slots)
        self.offsets_T = torch.from_numpy(self._offsets)
        self._lists: dict[int | None, _Lists] = {}
        self._layout: ShardLayout | None = None

    def fill(self, layout: ShardLayout, tokens: Int64s) -> None:
        """Take the values of a step.

        Args:
            layout: with `rows` sequences of one new token each, and at most `capacity` pages.
            tokens: their ids.
        """
        self._layout = layout
        self._tokens[:] = tokens
        self._positions[:] = layout.starts
        writes = layout.writes(self._member)
        self._slots.fill(-1)
        rows = slice(None) if writes.rows is None else writes.rows
        self._slots[rows], self._offsets[rows] = writes.slots, writes.offsets
        for window, lists in self._lists.items():
            self._fill(lists, layout, window)

    def lists(self, window: int | None) -> PageLists:
        """The page lists of layers with this window; rows that see none of this rank's pages have
        an empty one."""
        return self._of(window).pages

    def remote_tokens(self, window: int | None) -> int:
        """Tokens that a layer reads in place from other ranks' pools."""
        return self._of(window).remote_tokens

    def _of(self, window: int | None) -> _Lists:
        lists = self._lists.get(window)
        if lists is None:
            if self._layout is None:
                raise ValueError("fill comes first")
            lists = self._lists[window] = _Lists(self.rows, self.capacity)
            self._fill(lists, self._layout, window)
        return lists

    def _fill(self, lists: _Lists, layout: ShardLayout, window: int | None) -> None:
        pages = layout.pages
        seen = self._readers[pages.owners] == self._member
        if window is not None:
            sequence = np.repeat(np.arange(self.rows), np.diff(pages.first))
            first_seen = np.maximum(layout.starts - window + 1, 0)
            seen &= pages.positions + layout.page_size > first_seen[sequence]
        index = np.flatnonzero(seen)
        count = len(index)
        lists.page_ids[:count] = pages.ids[index]
        lists.page_positions[:count] = pages.positions[index]
        bounds = np.searchsorted(index, pages.first)
        items = lists.items
        items[:, 0], items[:, 1] = np.arange(self.rows), 1
        items[:, 2], items[:, 5] = layout.starts, layout.lengths
        items[:, 3], items[:, 4] = bounds[:-1], np.diff(bounds)
        items[:, 6], items[:, 7] = 0, self._kv_heads
        remote = seen & (pages.owners != self._sp_rank)
        lists.remote_tokens = int(pages.tokens[remote].sum())

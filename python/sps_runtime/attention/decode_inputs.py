"""What attention reads in a step of one new token a sequence, in arrays that stay: later steps of
the same shape write other values into them, so that a recording of the step can be replayed.

This runs between two replays, when all caches are full of weights and each line of Python costs
several times what it does in a loop; so it goes from the plan to the arrays in few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sps_runtime.attention.backend import PageLists
from sps_runtime.attention.row_pages import (
    Int32s,
    Int64s,
    PageReaders,
    RowPages,
    row_pages,
    row_writes,
)
from sps_runtime.ops.devices import CPU, Fence, Standing, pinned
from sps_runtime.types.plan import StepPlan

Feed = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""An array, and its values in each of some steps: ``[steps, *the array's shape]``, of its dtype."""


@dataclass(frozen=True)
class TokenSource:
    """Where a step's tokens come from that the host does not know.

    Attributes:
        tokens_T: int64 ``[slots]`` on the device.
        slots: int64, for each sequence the slot of its token; -1 where the host knows it.
    """

    tokens_T: torch.Tensor
    slots: npt.NDArray[np.int64]


class _Lists:
    """Page lists of all rows for one window."""

    def __init__(self, rows: int, capacity: int, kv_heads: int, device: torch.device) -> None:
        tensors = [
            pinned(np.zeros(shape, dtype=np.int32), device)
            for shape in ((rows, 8), (capacity,), (capacity,))
        ]
        self.items, self.page_ids, self.page_positions = (tensor.numpy() for tensor in tensors)
        self.items[:, 0], self.items[:, 1], self.items[:, 7] = np.arange(rows), 1, kv_heads
        self.used = 0
        self.remote_tokens = 0
        ids, positions = tensors[1:]
        self.pages = PageLists(tensors[0], ids, positions, complete=True, standing=True)

    def put(self, row: int, position: int, ids: Int32s, positions: Int32s) -> None:
        """The pages that a row at `position` sees."""
        begin, count = self.used, len(ids)
        self.used = end = begin + count
        self.page_ids[begin:end] = ids
        self.page_positions[begin:end] = positions
        self.items[row, 2:6] = position, begin, count, position + 1

    def put_steps(self, rows: Sequence[RowPages], position_SR: Int64s) -> Feed:
        """The pages that all rows see in some steps, and what the steps' items are."""
        item_SRI = np.repeat(self.items[None], len(position_SR), axis=0)
        item_SRI[:, :, 2], item_SRI[:, :, 5] = position_SR, position_SR + 1
        begin = 0
        for row, pages in enumerate(rows):
            end = begin + len(pages.ids)
            self.page_ids[begin:end], self.page_positions[begin:end] = pages.ids, pages.starts
            item_SRI[:, row, 3] = begin + pages.begin_S
            item_SRI[:, row, 4] = pages.end_S - pages.begin_S
            begin = end
        return self.items, item_SRI


@dataclass(frozen=True)
class StepFeeds:
    """What differs from step to step of a burst, but for tokens.

    Attributes:
        feeds: the arrays that every step finds with other values.
        remote_S: for each window, int64 ``[steps]`` tokens that a layer reads in place from other
            ranks' pools.
    """

    feeds: list[Feed]
    remote_S: dict[int | None, Int64s]


class DecodeInputs:
    """Arrays of `rows` rows; row i is the new token of the plan's sequence i.

    Args:
        rows: sequences of the step.
        capacity: pages of all of them together, at most.
        kv_heads: of the TP slice.
        device: where tokens, positions and places lie; page lists stay on the host, where backends
            plan.

    Attributes:
        tokens_T, positions_T: int64 ``[rows]``.
        slots_T, offsets_T: int32 ``[rows]`` where this rank writes the row's K and V; slot -1 where
            another rank does.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        kv_heads: int,
        readers: PageReaders,
        device: torch.device = CPU,
    ) -> None:
        self.rows, self.capacity = rows, capacity
        self._kv_heads = kv_heads
        self._who = readers
        self._member_of = np.array(readers.readers)
        self._page_starts = np.arange(capacity, dtype=np.int32) * readers.page_size
        arrays = (
            np.zeros(rows, dtype=np.int64),
            np.zeros(rows, dtype=np.int64),
            np.full(rows, -1, dtype=np.int32),
            np.zeros(rows, dtype=np.int32),
            np.full(rows, -1, dtype=np.int64),
        )
        self._standing = tuple(Standing(array, device) for array in arrays)
        self._copied, self._device = Fence(device), device
        self._tokens, self._positions, self._slots, self._offsets, self._sources = (
            each.array for each in self._standing
        )
        self.tokens_T, self.positions_T, self.slots_T, self.offsets_T, self._sources_T = (
            each.tensor for each in self._standing
        )
        self._lists: dict[int | None, _Lists] = {}
        self._plan: StepPlan | None = None

    def fill(
        self, plan: StepPlan, tokens: Sequence[int], source: TokenSource | None = None
    ) -> None:
        """Take the values of a step.

        Args:
            plan: with at most `rows` sequences of one new token each, and at most `capacity`
                pages; rows beyond them read one key and write nothing.
            tokens: their ids; any where `source` has them.
            source: read in the order of the stream.

        Raises:
            ValueError: a sequence's pages do not cover its tokens, or a new token's page lies
                outside of the group.
        """
        self._plan = plan
        who = self._who
        self._copied.wait()
        used = len(plan.sequences)
        self._tokens[:used], self._tokens[used:] = tokens, 0
        self._sources[:] = -1
        if source is not None:
            self._sources[:used] = source.slots
        self._positions[used:], self._slots[used:], self._offsets[used:] = 0, -1, 0
        for row, sequence in enumerate(plan.sequences):
            page, offset = divmod(sequence.start, who.page_size)
            if len(sequence.pages) < 4 * (page + 1):
                raise ValueError(f"epoch {plan.epoch}: pages do not cover the sequences' tokens")
            id_bytes = sequence.pages[4 * page : 4 * page + 4]
            owner, slot = divmod(int.from_bytes(id_bytes, "little"), who.pages_per_rank)
            if owner not in plan.group:
                raise ValueError(f"epoch {plan.epoch} writes pages outside its group {plan.group}")
            self._positions[row] = sequence.start
            self._slots[row] = slot if owner == who.sp_rank else -1
            self._offsets[row] = offset
        for each in self._standing:
            each.upload()
        self._copied.record()
        if source is not None:
            found_T = source.tokens_T[self._sources_T.clamp(min=0)]
            self.tokens_T.copy_(torch.where(self._sources_T < 0, self.tokens_T, found_T))
        for window, lists in self._lists.items():
            self._fill(lists, plan, window)

    def feeds(self, plan: StepPlan, steps: int) -> StepFeeds:
        """Take what all steps of a burst have in common, and say what each finds else. For a CPU,
        and after `fill` with the plan of the first step; step 0 is that one.

        Args:
            plan: of as many sequences as there are rows, with at most `capacity` pages at its end.

        Raises:
            ValueError: as `fill` does.
        """
        who, sequences = self._who, plan.sequences
        places = [row_writes(sequence, steps, plan.group, who) for sequence in sequences]
        starts_R = np.array([sequence.start for sequence in sequences])
        position_SR = starts_R + np.arange(steps)[:, None]
        feeds: list[Feed] = [
            (self._positions, position_SR),
            (self._slots, np.stack([slots for slots, _ in places], 1).astype(np.int32)),
            (self._offsets, np.stack([offsets for _, offsets in places], 1).astype(np.int32)),
        ]
        remote_S: dict[int | None, Int64s] = {}
        for window, lists in self._lists.items():
            rows = [row_pages(sequence, steps, window, who) for sequence in sequences]
            feeds.append(lists.put_steps(rows, position_SR))
            remote_S[window] = sum((row.remote_S for row in rows), np.zeros(steps, np.int64))
        return StepFeeds(feeds, remote_S)

    def sent(self) -> None:
        """Backends have launched what reads the page lists: they are not written again before that
        is done."""
        self._copied.record()

    def standing(self) -> list[PageLists]:
        """All page lists that were asked for."""
        return [lists.pages for lists in self._lists.values()]

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
            if self._plan is None:
                raise ValueError("fill comes first")
            size = (self.rows, self.capacity, self._kv_heads)
            lists = self._lists[window] = _Lists(*size, self._device)
            self._fill(lists, self._plan, window)
        return lists

    def _fill(self, lists: _Lists, plan: StepPlan, window: int | None) -> None:
        who = self._who
        alone, all_mine = len(who.readers) == 1, who.all_mine
        lists.used = lists.remote_tokens = 0
        for row, sequence in enumerate(plan.sequences):
            position = sequence.start
            end = position // who.page_size + 1
            begin = 0 if window is None else max(position - window + 1, 0) // who.page_size
            ids = np.frombuffer(sequence.pages, np.int32, end - begin, 4 * begin)
            starts = self._page_starts[begin:end]
            if alone:
                lists.put(row, position, ids, starts)
                continue
            owners = ids // who.pages_per_rank
            if not all_mine:
                mine = np.flatnonzero(self._member_of[owners] == who.member)
                ids, starts, owners = ids[mine], starts[mine], owners[mine]
            lists.put(row, position, ids, starts)
            remote = starts[owners != who.sp_rank]
            lists.remote_tokens += int(np.minimum(position + 1 - remote, who.page_size).sum())
        some_page = np.frombuffer(plan.sequences[0].pages, np.int32, 1)
        for row in range(len(plan.sequences), self.rows):
            lists.put(row, 0, some_page, self._page_starts[:1])

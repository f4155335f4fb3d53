"""Which tokens stride attention keeps at each level, and who sends them to whom: integers only.

CSPS (the baseline that `sequence_parallel.stride` computes): at a level with stride s a head
of phase p keeps the tokens t with t = p (mod s), of queries, keys and values alike. Counted by
``j = (t - p) / s`` the kept tokens of a sequence are consecutive, and a page of B tokens keeps
B / s of every phase; so a level is causal attention over shorter pages, and runs as any other.

A *unit* is such a shorter page: what a few consecutive pages of one owner keep. Its keys are put
together for one phase (that of one KV head) at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import QueryRun
from sps_runtime.attention.page_reads import Mask, ranges
from sps_runtime.attention.shard_layout import Ints, Runs, ShardLayout
from sps_runtime.types.attention import SparseSettings

OUTSIDE = -1
"""Stands for the member where a page lies with no member of the group."""


@dataclass(frozen=True)
class Level:
    """One level above the dense one.

    Attributes:
        ranks: members [i * ranks, (i + 1) * ranks) attend to one another's tokens in it,
        inner: but not to those of members [i * inner, (i + 1) * inner), which lower levels see.
        stride: one token in so many is kept.
        top: the level of the whole group, which also sees pages outside of it.
    """

    ranks: int
    inner: int
    stride: int
    top: bool


def levels_of(settings: SparseSettings, size: int) -> list[Level]:
    """The levels of a group of `size` members, inner ones first; a group of one has none."""
    inner, levels = 1, []
    for ranks, stride in settings.levels:
        if inner < ranks < size:
            levels.append(Level(ranks, inner, stride, False))
            inner = ranks
    return [*levels, Level(size, inner, settings.stride, True)] if size > 1 else []


@dataclass(frozen=True)
class KeptKeys:
    """The kept tokens of one owner and phase, in the order in which they travel.

    Attributes:
        page_ids, offsets: int64, the page of each and its place in the page.
        places: where they go among the units, ``unit * unit_tokens + index``.
        table: place of each one's page in the layout's table.
    """

    page_ids: Tensor
    offsets: Tensor
    places: Tensor
    table: Ints

    def __len__(self) -> int:
        return len(self.places)

    def of_pages(self, which: Mask) -> KeptKeys:
        """Those of some pages of the table."""
        index = np.flatnonzero(which[self.table])
        at = torch.from_numpy(index)
        return KeptKeys(self.page_ids[at], self.offsets[at], self.places[at], self.table[index])


class StridedLayout:
    """One level of one step, as the members of one of its groups see it.

    Args:
        layout: of the step's sequences that are computed by stride.
        level: of `levels_of`.
        me: a member; the level's group is the one that it is in.

    Attributes:
        members: of the level's group.
        units, unit_tokens: how many units there are, and tokens of a full one.

    Raises:
        ValueError: pages do not divide by the stride.
    """

    def __init__(self, layout: ShardLayout, level: Level, me: int) -> None:
        if layout.page_size % level.stride:
            raise ValueError(f"pages of {layout.page_size} do not divide by {level.stride}")
        self._layout, self._level = layout, level
        first = me // level.ranks * level.ranks
        self.members = range(first, min(first + level.ranks, len(layout.group)))
        self._find_units()
        self._keep_crossing()
        self.unit_tokens = self._pages * layout.page_size // level.stride
        self.units = len(self._owner)

    def keys(self, owner: int, phase: int) -> KeptKeys:
        """What a member (or `OUTSIDE`) holds of the units."""
        stride, page = self._level.stride, self._layout.page_size
        unit = np.flatnonzero(self._owner == owner)
        begin = self._position[unit]
        kept = _kept(self._layout.lengths[self._sequence[unit]], phase, stride) - begin
        kept = np.clip(kept, 0, self.unit_tokens)
        index = ranges(np.zeros_like(kept), kept)
        unit = np.repeat(unit, kept)
        token = (self._position[unit] + index) * stride + phase
        table = self._layout.pages.first[self._sequence[unit]] + token // page
        return KeptKeys(
            torch.from_numpy(self._layout.pages.ids[table].astype(np.int64)),
            torch.from_numpy(token % page),
            torch.from_numpy(unit * self.unit_tokens + index),
            table,
        )

    def rows(self, member: int, phase: int) -> Ints:
        """The rows of a member whose queries travel."""
        rows, _ = self._kept_rows(member, phase)
        return rows

    def query_runs(self, parts: Sequence[tuple[int, int, int]], phase: int) -> list[QueryRun]:
        """Queries that came together, over the units that they see.

        Args:
            parts: (member, begin, end): rows [begin, end) of `rows(member)`, laid end to end.
        """
        found = []
        at = 0
        for member, begin, end in parts:
            _, runs = self._kept_rows(member, phase)
            for sequence, row, count, position in runs:
                low, high = max(row, begin), min(row + count, end)
                if low < high:
                    kept = position + low - row
                    found.append(
                        self._run(member, sequence, at + low - begin, high - low, kept, phase)
                    )
            at += end - begin
        return found

    def _run(
        self, member: int, sequence: int, row: int, count: int, position: int, phase: int
    ) -> QueryRun:
        seen = (self._sequence == sequence) & (self._position < position + count)
        seen &= self._inner_group(self._owner) != member // self._level.inner
        unit = np.flatnonzero(seen)
        length = int(_kept(self._layout.lengths[sequence], phase, self._level.stride))
        ids = torch.from_numpy(unit.astype(np.int32))
        positions = torch.from_numpy(self._position[unit].astype(np.int32))
        return QueryRun(row, count, position, ids, positions, length)

    def _kept_rows(self, member: int, phase: int) -> tuple[Ints, Runs]:
        """Rows that travel, and runs of them: rows in what travels, positions by j."""
        runs, stride = self._layout.runs(member), self._level.stride
        runs = runs.take(self._queries_cross[self._place(member), runs.sequence])
        begin = _kept(runs.position, phase, stride)
        count = _kept(runs.position + runs.count, phase, stride) - begin
        kept = Runs(runs.sequence, np.cumsum(count) - count, count, begin)
        first = runs.row + begin * stride + phase - runs.position
        rows = np.repeat(first, count) + ranges(np.zeros_like(count), count) * stride
        return rows, kept.take(count > 0)

    def _find_units(self) -> None:
        """Cut stretches of pages with one owner into units of as many pages as divide them all."""
        layout, stride = self._layout, self._level.stride
        pages, member = layout.pages, members_of_pages(layout)
        sequence = np.repeat(np.arange(len(layout.lengths)), np.diff(pages.first))
        breaks = (np.diff(member) != 0) | (np.diff(sequence) != 0)
        first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        count = np.diff(np.append(first, len(member)))
        last = np.append(np.diff(sequence[first]) != 0, True)
        self._pages = math.gcd(stride, *count[~last].tolist())
        units = -(-count // self._pages)
        begin = ranges(np.zeros_like(units), units) * self._pages + np.repeat(first, units)
        self._owner, self._sequence = member[begin], sequence[begin]
        self._position = pages.positions[begin].astype(np.int64) // stride

    def _keep_crossing(self) -> None:
        """Leave out units that nobody sees in this level, and note whose queries see some."""
        layout, level = self._layout, self._level
        here = np.isin(self._owner, self.members)
        self._select(here | (self._owner == OUTSIDE) if level.top else here)
        sequences = len(layout.lengths)
        inner = np.array([member // level.inner for member in self.members])
        computes = np.zeros((len(self.members), sequences), dtype=bool)
        for at, member in enumerate(self.members):
            computes[at, layout.runs(member).sequence] = True
        owner = self._inner_group(self._owner)
        asked = computes[:, self._sequence] & (inner[:, None] != owner[None])
        place, unit = np.nonzero(asked)
        self._queries_cross = np.zeros_like(computes)
        self._queries_cross[place, self._sequence[unit]] = True
        self._select(asked.any(0))

    def _select(self, which: Mask) -> None:
        self._owner, self._sequence = self._owner[which], self._sequence[which]
        self._position = self._position[which]

    def _inner_group(self, member: Ints) -> Ints:
        """The group of the level below; `OUTSIDE` is in none."""
        return np.where(member == OUTSIDE, OUTSIDE, member // self._level.inner)

    def _place(self, member: int) -> int:
        return member - self.members[0]


def members_of_pages(layout: ShardLayout) -> Ints:
    """The member that each page of the table lies on, or `OUTSIDE`."""
    group, owners = np.asarray(layout.group), layout.pages.owners
    member = np.minimum(np.searchsorted(group, owners), len(group) - 1)
    return np.where(group[member] == owners, member, OUTSIDE)


def _kept(tokens: Ints, phase: int, stride: int) -> Ints:
    """How many of the first `tokens` positions are kept."""
    return np.maximum(tokens - phase + stride - 1, 0) // stride

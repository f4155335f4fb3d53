"""Who computes which token of a step, and where its KV lies: integers only, from the plan.

A token is computed by the rank that owns its page (`sharded`), or by every rank of the group
(`replicated`). A rank's rows are in the order of the plan's sequences, positions ascending within
each. This runs in every decode step, so tokens and pages are treated by numpy as a whole; only runs
of consecutive tokens are ever walked in Python.

A *member* is an index into the plan's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sps_runtime.types.attention import SparseSettings
from sps_runtime.types.plan import Placement, SequencePlan, StepPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PageTable:
    """The pages of all sequences of a step, end to end.

    Attributes:
        ids: int32 page ids.
        positions: int32 absolute position of each page's first token.
        tokens: tokens each page holds after the step (page_size but for a sequence's last).
        owners: SP rank that each page lies on.
        first: ``[sequences + 1]`` where each sequence's pages begin.
    """

    ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    tokens: Ints
    owners: Ints
    first: Ints


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive positions of one sequence in consecutive rows of one member, by row.

    Attributes (equally long):
        sequence: index in the plan.
        row: first row.
        count: rows.
        position: absolute position of the first row.
    """

    sequence: Ints
    row: Ints
    count: Ints
    position: Ints

    def __len__(self) -> int:
        return len(self.row)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, row, count, position) of each run."""
        return zip(
            self.sequence.tolist(),
            self.row.tolist(),
            self.count.tolist(),
            self.position.tolist(),
            strict=True,
        )

    def take(self, index: npt.NDArray[np.bool_] | Ints) -> Runs:
        return Runs(self.sequence[index], self.row[index], self.count[index], self.position[index])


@dataclass(frozen=True)
class KVWrites:
    """Where a member writes new KV.

    Attributes:
        rows: the member's rows that it writes; None for all of them.
        slots, offsets: page slot in its own pool and place in the page, one per row written.
    """

    rows: Ints | None
    slots: Ints
    offsets: Ints


class ShardLayout:
    """How one step lies on its group.

    Attributes:
        epoch, group, placement: the plan's.
        page_size: tokens of a page.
        starts, counts: ``[sequences]`` first new position and new tokens of each sequence.
        lengths: ``[sequences]`` tokens of each sequence after the step.
        pages: all sequences' pages.
        board_slots: of each sequence.
        sparse: how each sequence is prefilled in this step; None where it reads all pages.
        sparse_decode: the settings of sequences whose generated token reads chosen pages.
        summaries_from: as in `SequencePlan`.
        ends: whether each sequence's prompt ends with this step (or ended before).
        rows: rows that each member computes.

    Raises:
        ValueError: a sequence's pages do not cover its tokens, or a new token's page lies outside
            the group.
    """

    def __init__(self, plan: StepPlan, *, page_size: int, pages_per_rank: int) -> None:
        self.epoch = plan.epoch
        self.group = plan.group
        self.placement: Placement = plan.placement
        self.page_size = page_size
        self.starts = np.array([s.start for s in plan.sequences], dtype=np.int64)
        self.counts = np.array([s.count for s in plan.sequences], dtype=np.int64)
        self.lengths = self.starts + self.counts
        self.pages = _page_table(plan, self.lengths, page_size, pages_per_rank)
        self.board_slots = tuple(s.slot for s in plan.sequences)
        self.sparse = tuple(_sparse_prefill(s, plan) for s in plan.sequences)
        self.sparse_decode = tuple(_sparse_decode(s) for s in plan.sequences)
        self.ends = tuple(s.sample is not None for s in plan.sequences)
        self.summaries_from = tuple(s.summaries_from for s in plan.sequences)
        first_token = np.cumsum(self.counts) - self.counts
        self._sequence = np.repeat(np.arange(len(self.counts)), self.counts)
        self._position = (
            np.arange(len(self._sequence)) + (self.starts - first_token)[self._sequence]
        )
        page = self.pages.first[self._sequence] + self._position // page_size
        self._slot = self.pages.ids[page].astype(np.int64) % pages_per_rank
        self._member = self._members_of(self.pages.owners[page])
        self._last_token = first_token + self.counts - 1
        if self.placement == "sharded":
            self.rows = tuple(np.bincount(self._member, minlength=len(self.group)).tolist())
        else:
            self.rows = (len(self._sequence),) * len(self.group)
        self._indices: dict[int, Ints] = {}
        self._runs: dict[int, Runs] = {}

    def member(self, sp_rank: int) -> int:
        """The index of an SP rank in the group."""
        return self.group.index(sp_rank)

    def token_index(self, member: int) -> Ints:
        """For each row of a member, its token's index in the plan's tokens laid end to end (in the
        order of the plan's sequences): how a runner gathers ids."""
        if self.placement == "replicated":
            member = 0
        index = self._indices.get(member)
        if index is None:
            if self.placement == "replicated":
                index = np.arange(len(self._sequence))
            else:
                index = np.flatnonzero(self._member == member)
            self._indices[member] = index
        return index

    def positions(self, member: int) -> Ints:
        """Absolute position of each row of a member."""
        return self._position[self.token_index(member)]

    def sequences(self, member: int) -> Ints:
        """Index in the plan of each row's sequence."""
        return self._sequence[self.token_index(member)]

    def runs(self, member: int) -> Runs:
        """A member's rows as runs of consecutive positions, in row order."""
        if self.placement == "replicated":
            member = 0
        runs = self._runs.get(member)
        if runs is None:
            runs = self._runs[member] = self._find_runs(member)
        return runs

    def writes(self, member: int) -> KVWrites:
        """Where a member puts its new KV."""
        if self.placement == "sharded":
            token = self.token_index(member)
            rows = None
        else:
            token = rows = np.flatnonzero(self._member == member)
        return KVWrites(rows, self._slot[token], self._position[token] % self.page_size)

    def last_row(self, sequence: int) -> tuple[int, int]:
        """(member, row) of a sequence's last new token: the owner of its page, which samples."""
        token = int(self._last_token[sequence])
        member = int(self._member[token])
        return member, int(np.searchsorted(self.token_index(member), token))

    def _members_of(self, owners: Ints) -> Ints:
        group = np.asarray(self.group)
        members = np.minimum(np.searchsorted(group, owners), len(group) - 1)
        if (group[members] != owners).any():
            raise ValueError(f"epoch {self.epoch} writes pages outside its group {self.group}")
        return members

    def _find_runs(self, member: int) -> Runs:
        token = self.token_index(member)
        if not len(token):
            empty = np.zeros(0, dtype=np.int64)
            return Runs(empty, empty, empty, empty)
        sequence, position = self._sequence[token], self._position[token]
        breaks = (np.diff(sequence) != 0) | (np.diff(position) != 1)
        row = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        count = np.diff(np.append(row, len(token)))
        return Runs(sequence[row], row, count, position[row])


def _sparse_prefill(sequence: SequencePlan, plan: StepPlan) -> SparseSettings | None:
    """The settings of a sequence that a step prefills sparsely: such a step begins with a
    superblock. A superblock of one token reads all pages, whoever computes it, so that nobody need
    tell it from a generated token. Stride attention on one rank is exact."""
    sparse = sequence.attention.sparse
    if sparse is None or plan.placement != "sharded" or sequence.board_epoch >= 0:
        return None
    if sparse.estimator == "stride" and len(plan.group) == 1:
        return None
    alone = sequence.count == 1 or sequence.start != sparse.align(sequence.start)
    return None if alone else sparse


def _sparse_decode(sequence: SequencePlan) -> SparseSettings | None:
    """The settings of a sequence whose new token is generated and reads chosen pages. One at a
    superblock's beginning reads all: it might be a prompt's."""
    sparse = sequence.attention.sparse
    if sparse is None or sparse.decode == "exact" or sequence.count > 1:
        return None
    published = sparse.estimator == "stride"  # which makes no summaries
    return None if published or sequence.start == sparse.align(sequence.start) else sparse


def _page_table(plan: StepPlan, lengths: Ints, page_size: int, pages_per_rank: int) -> PageTable:
    per_sequence = -(-lengths // page_size)
    if any(len(s.pages) < 4 * n for s, n in zip(plan.sequences, per_sequence, strict=True)):
        raise ValueError(f"epoch {plan.epoch}: pages do not cover the sequences' tokens")
    packed = (s.pages[: 4 * n] for s, n in zip(plan.sequences, per_sequence, strict=True))
    ids = np.frombuffer(b"".join(packed), dtype=np.int32)
    first = np.concatenate(([0], np.cumsum(per_sequence)))
    sequence = np.repeat(np.arange(len(per_sequence)), per_sequence)
    positions = (np.arange(len(ids)) - first[sequence]) * page_size
    return PageTable(
        ids=ids,
        positions=positions.astype(np.int32),
        tokens=np.minimum(page_size, lengths[sequence] - positions),
        owners=ids.astype(np.int64) // pages_per_rank,
        first=first,
    )

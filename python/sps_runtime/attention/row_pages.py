"""Which pages a sequence's new token sees, and where its KV is written, in steps of one token each.

A page belongs to the rank that owns it; who attends to it is told by `PageReaders`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sps_runtime.types.plan import SequencePlan

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PageReaders:
    """Who attends to which pages.

    Attributes:
        page_size, pages_per_rank: of the pools.
        sp_rank: this SP rank.
        member: its index in the group.
        readers: for each SP rank, the member of the group that attends to its pages.
    """

    page_size: int
    pages_per_rank: int
    sp_rank: int
    member: int
    readers: tuple[int, ...]

    @property
    def all_mine(self) -> bool:
        """Whether this rank attends to every page."""
        return all(reader == self.member for reader in self.readers)


@dataclass(frozen=True)
class RowPages:
    """The pages of a row that this rank attends to in some steps.

    Attributes:
        ids, starts: int32 ``[pages]`` of all steps together: global ids, and the positions of their
            first tokens, ascending.
        begin_S, end_S: int64 ``[steps]``: a step sees pages [begin, end) of them.
        remote_S: int64 ``[steps]`` tokens that a step reads in place from other ranks' pools.
    """

    ids: Int32s
    starts: Int32s
    begin_S: Int64s
    end_S: Int64s
    remote_S: Int64s


def row_pages(sequence: SequencePlan, steps: int, window: int | None, who: PageReaders) -> RowPages:
    """The pages of a sequence at positions [start, start + steps), one a step.

    Args:
        sequence: its pages cover all these positions.
        window: keys that a layer sees; None for all.
    """
    position_S = sequence.start + np.arange(steps)
    end_S = position_S // who.page_size + 1
    begin_S = np.zeros_like(end_S)
    if window is not None:
        begin_S = np.maximum(position_S - window + 1, 0) // who.page_size
    low, high = int(begin_S[0]), int(end_S[-1])
    ids = np.frombuffer(sequence.pages, np.int32, high - low, 4 * low)
    starts = np.arange(low, high, dtype=np.int32) * who.page_size
    owners = ids // who.pages_per_rank
    mine = np.array(who.readers)[owners] == who.member
    mine_before = np.concatenate(([0], mine.cumsum()))
    begin_S, end_S = mine_before[begin_S - low], mine_before[end_S - low]
    ids, starts, remote = ids[mine], starts[mine], owners[mine] != who.sp_rank
    remote_S = np.zeros(steps, dtype=np.int64)
    if remote.any():
        index = np.arange(len(ids))
        seen_SP = remote & (begin_S[:, None] <= index) & (index < end_S[:, None])
        tokens_SP = np.minimum(position_S[:, None] + 1 - starts, who.page_size)
        remote_S = np.where(seen_SP, tokens_SP, 0).sum(1)
    return RowPages(ids, starts, begin_S, end_S, remote_S)


def row_writes(
    sequence: SequencePlan, steps: int, group: tuple[int, ...], who: PageReaders
) -> tuple[Int64s, Int64s]:
    """Where the K and V of positions [start, start + steps) go: slots ``[steps]`` of this rank's
    pool, -1 where another rank writes them, and offsets in their pages.

    Raises:
        ValueError: pages do not cover the positions, or a page lies outside of the group.
    """
    pages_S, offset_S = np.divmod(sequence.start + np.arange(steps), who.page_size)
    if len(sequence.pages) < 4 * (int(pages_S[-1]) + 1):
        raise ValueError(f"slot {sequence.slot}: pages do not cover the sequence's tokens")
    ids_S = np.frombuffer(sequence.pages, np.int32)[pages_S]
    owner_S, slot_S = np.divmod(ids_S, who.pages_per_rank)
    if not set(np.unique(owner_S).tolist()) <= set(group):
        raise ValueError(f"slot {sequence.slot} writes pages outside its group {group}")
    return np.where(owner_S == who.sp_rank, slot_S, -1), offset_S

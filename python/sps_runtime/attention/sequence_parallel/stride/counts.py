"""What stride attention left out in a step, in the units of `types.attention.SparseCounters`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.strided_layout import OUTSIDE, Level, members_of_pages
from sps_runtime.types.attention import SparseCounters


class StrideCounts:
    """Counts over the layers without a window of one step, by sequence.

    No page is chosen, but one token in s: of a pair of pages 1 / s^2 of the products, of a page
    1 / s. They are counted as so many whole ones, rounded down. What crosses is divided over
    sequences that share the step by the tokens that they have.
    """

    def __init__(self, step: StepState, levels: Sequence[Level]) -> None:
        self._step, self._layers, self._bytes = step, 0, 0
        layout = step.layout
        sequences = len(layout.counts)
        heads = step.context.store.shape.kv_heads
        read, causal, fetched, remote = (np.zeros(sequences) for _ in range(4))
        for sequence in np.unique(layout.sequences(step.me)).tolist():
            found = _of_sequence(step, levels, sequence)
            read[sequence], causal[sequence], fetched[sequence], remote[sequence] = found
        self._each = [heads * x for x in (read, causal, fetched, remote)]

    def add(self, nbytes: int) -> None:
        """One layer more, for which this rank sent or read so many bytes."""
        self._layers += 1
        self._bytes += nbytes

    def of_sequences(self) -> tuple[SparseCounters, ...]:
        """Those of the sequences that this rank computed tokens of."""
        layout = self._step.layout
        read, causal, fetched, remote = (x * self._layers for x in self._each)
        share = self._bytes * layout.lengths / layout.lengths.sum()
        return tuple(
            SparseCounters(
                slot=layout.board_slots[sequence],
                read_pairs=int(read[sequence]),
                causal_pairs=int(causal[sequence]),
                fetched_units=int(fetched[sequence]),
                remote_units=int(remote[sequence]),
                remote_bytes=int(share[sequence]),
            )
            for sequence in range(len(layout.counts))
            if causal[sequence]
        )


def _of_sequence(
    step: StepState, levels: Sequence[Level], sequence: int
) -> tuple[float, float, float, float]:
    """Pairs of pages read and causal, remote pages read and seen: of one layer and KV head."""
    layout, page = step.layout, step.layout.page_size
    pages = slice(*layout.pages.first[sequence : sequence + 2].tolist())
    owners = members_of_pages(layout)[pages]
    positions = layout.positions(step.me)[layout.sequences(step.me) == sequence]
    remote = (owners != step.me) & (layout.pages.positions[pages] <= positions.max())
    local = _seen(owners == step.me, positions, page)
    read, fetched = float(local.sum()), 0.0
    for level in levels:
        group = np.where(owners == OUTSIDE, OUTSIDE, owners // level.ranks)
        inner = np.where(owners == OUTSIDE, OUTSIDE, owners // level.inner)
        here = (group == step.me // level.ranks) | (level.top & (owners == OUTSIDE))
        here &= inner != step.me // level.inner
        read += float(_seen(here, positions, page).sum()) / level.stride**2
        fetched += float((here & remote).sum()) / level.stride
    causal = float((positions + 1).sum())
    return read / page**2, causal / page**2, fetched, float(remote.sum())


def _seen(of_pages: np.ndarray, positions: Ints, page: int) -> Ints:
    """How many tokens of some pages lie at or before each position."""
    before = np.concatenate(([0], np.cumsum(of_pages))) * page
    at = positions // page
    seen: Ints = before[at] + of_pages[at] * (positions % page + 1)
    return seen

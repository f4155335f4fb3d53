"""Generated tokens as the last rows of query blocks all of whose other rows are unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_choice import kept_spans
from sps_runtime.sparse.operators import Chosen, QueryBlocks
from sps_runtime.types.attention import SparseSettings


class LastRows:
    """The tokens of a decode step whose pages can all be read in place.

    Attributes:
        queries: of `SparseOperators.choose_for_last_rows`.
    """

    def __init__(self, step: StepState, settings: SparseSettings) -> None:
        layout, mesh = step.layout, step.context.mesh
        self._size = max(settings.block, layout.page_size)
        self._starts = torch.from_numpy(layout.starts.astype(np.int32))
        inside, at = layout.starts % self._size, np.arange(len(layout.starts))
        begin = layout.starts - inside
        fields = (at * self._size, inside + 1, begin, at, layout.pages.first[:-1], layout.lengths)
        blocks = torch.from_numpy(np.stack(fields, axis=1).astype(np.int32))
        self.queries = QueryBlocks(blocks, torch.tensor(layout.pages.ids), len(at))
        self._rows = torch.from_numpy((at * self._size + inside).astype(np.int64))
        self._slots = step.context.store.shape.slots
        group = layout.group
        readers = [group.index(r) if r in group else r % step.size for r in range(mesh.sp_size)]
        self._reads = None if step.size == 1 else np.array(readers) == step.me
        self._room: Tensor | None = None

    def of(self, q_THD: Tensor) -> Tensor:
        """Rows of the blocks, in which only the last of each are queries."""
        if self._room is None:
            self._room = q_THD.new_zeros(len(self._rows) * self._size, *q_THD.shape[1:])
        self._room[self._rows] = q_THD
        return self._room

    def part(self, chosen: Chosen) -> Chosen:
        """What this rank reads of a choice, for the tokens as rows of their own."""
        items = chosen.items
        sequence = torch.div(items[:, 0], self._size, rounding_mode="floor")
        items[:, 0], items[:, 1], items[:, 2] = sequence, 1, self._starts[sequence.long()]
        if self._reads is None:
            return chosen
        kept = self._reads[chosen.page_ids.numpy() // self._slots]
        gone = self._reads[chosen.dropped_ids.numpy() // self._slots]
        items[:, 3:5] = kept_spans(items[:, 3:5], kept)
        chosen.dropped[:] = kept_spans(chosen.dropped, gone)
        keep = torch.from_numpy(kept)
        return replace(
            chosen,
            page_ids=chosen.page_ids[keep],
            page_positions=chosen.page_positions[keep],
            dropped_ids=chosen.dropped_ids[torch.from_numpy(gone)],
        )

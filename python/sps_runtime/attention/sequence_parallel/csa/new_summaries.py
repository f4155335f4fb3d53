"""The summaries of the pages that a step fills on this rank."""

from __future__ import annotations

import torch

from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_blocks import new_pages
from sps_runtime.sparse.operators import SparseOperators


class NewSummaries:
    """Written layer by layer, once the pages' KV is.

    Attributes:
        operators: the rank's sparse operators.

    Raises:
        ValueError: the rank keeps no summaries.
    """

    operators: SparseOperators

    def __init__(self, step: StepState) -> None:
        layout, context = step.layout, step.context
        if context.sparse is None:
            raise ValueError(f"epoch {layout.epoch} is sparse where pages have no summaries")
        self.operators = context.sparse.operators
        self._summaries, self._own = context.sparse.store.own, context.store.own
        new = new_pages(layout, context.mesh.sp_rank)
        self._slots = torch.from_numpy(layout.pages.ids[new] % context.store.shape.slots)

    def write(self, layer: int) -> None:
        """Summarise the pages in one layer."""
        if len(self._slots):
            k, v = self._own.k[layer], self._own.v[layer]
            self.operators.summarise(k, v, self._slots, self._summaries[layer])

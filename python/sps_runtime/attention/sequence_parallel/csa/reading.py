"""One layer of query blocks with the same settings: how they choose, and how they attend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks, wanted_pages
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SparseOperators
from sps_runtime.types.attention import SparseSettings


@dataclass
class Reading:
    """What is needed for both.

    Attributes:
        q_THD: of all the step's rows, or of those from a micro-batch's first on.
        pool: where pages lie now.
    """

    step: StepState
    operators: SparseOperators
    layer: int
    q_THD: Tensor
    blocks: SparseBlocks
    scale: float
    pool: PagePool

    @property
    def kv_heads(self) -> int:
        """Of this rank."""
        return self.step.context.store.shape.kv_heads

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_THD.shape[1] // self.kv_heads

    def choose(self, queries: QueryBlocks, settings: SparseSettings) -> Chosen:
        """Choose pages by their summaries."""
        summaries = self.step.context.summaries(self.layer)
        return self.operators.choose(
            self.q_THD, queries, self.pool.k, summaries, settings, self.scale
        )

    def wanted(self, chosen: Chosen) -> Mask:
        """The pages of a choice ``[pages of the layout's table, kv_heads]``."""
        return wanted_pages(self.step.layout, self.blocks, chosen, self.kv_heads)

    def attend(self, lists: PageLists) -> Partial:
        """The partial of all rows over some lists."""
        backend = self.step.context.backend
        return backend.partial_lists(self.q_THD, lists, self.pool, scale=self.scale)

    def tail(self, chosen: Chosen, kept: Partial) -> None:
        """Let means stand for what was dropped, in place."""
        summaries = self.step.context.summaries(self.layer)
        onto = (kept.o, kept.lse)
        self.operators.tail(self.q_THD, self.blocks.queries, chosen, summaries, self.scale, onto)

"""What sparse attention asks of tensors: summaries, choice, tail; kernels or torch behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sps_runtime.types.attention import SparseSettings


@dataclass(frozen=True)
class SummaryPool:
    """Summaries of one layer's full pages on several ranks, as far as they can be read from here.

    Attributes:
        pools: uint8 ``[slots, kv_heads, nbytes]`` per SP rank (0 slots where there are none here);
            what the bytes mean is the operators' own affair.
        slots_per_rank: page id = index in `pools` * slots_per_rank + slot.
        page_size, head_dim: of the pages that they summarise.
    """

    pools: Sequence[Tensor]
    slots_per_rank: int
    page_size: int
    head_dim: int


@dataclass(frozen=True)
class QueryBlocks:
    """Query blocks of this rank, in order of rows; those of a superblock stand together.

    Attributes:
        blocks: int32 ``[n, 6]``: first row, rows (fewer than a block only at a prompt's end),
            position of the first row, number of its superblock, first of its sequence's entries
            in `page_ids`, and kv_len (tokens of the sequence after the step).
        page_ids: int32 ``[entries]``, the pages of each sequence from position 0 on in order, one
            sequence after another; a block at position p chooses among the first
            p / page_size of its sequence, its own pages come next.
        superblocks: how many.
    """

    blocks: Tensor
    page_ids: Tensor
    superblocks: int


@dataclass(frozen=True)
class Chosen:
    """Which pages each (query block, KV head) reads. Item i of both belongs to block
    ``i // kv_heads`` and KV head ``i % kv_heads``.

    Attributes:
        items: int32 ``[blocks * kv_heads, 8]`` as `attention.backend.PageLists` has them, over the
            chosen pages before the block and the block's own pages.
        page_ids, page_positions: int32, of `items`.
        dropped: int32 ``[blocks * kv_heads, 2]``: first and number of the item's entries in
            `dropped_ids`.
        dropped_ids: int32, the pages before each block that it does not read.
        read_pairs, causal_pairs: of (block, page, KV head), own pages included.
    """

    items: Tensor
    page_ids: Tensor
    page_positions: Tensor
    dropped: Tensor
    dropped_ids: Tensor
    read_pairs: int
    causal_pairs: int


class SparseOperators(Protocol):
    """The estimator ``block`` and the tail. Implementations: `sparse.torch_operators` (the truth),
    `sps_kernel.sparse` behind `sparse.kernel_operators`; later Triton."""

    def summary_nbytes(self, page_size: int, head_dim: int, itemsize: int) -> int:
        """Bytes of the summaries of one page and KV head; itemsize of the pool's native dtype.

        bf16, d = 64, pages of 64: 1,536, which is 9.4% of the page's K and V: mean key, mean value,
        low and step of each channel, and 2 bits for each channel of each key.
        """
        ...

    def summarise(self, k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
        """Summarise full pages `slots` (int32) of one layer's own pool into the same slots of
        `out_SKX`. Native pages; quantised ones are given dequantised."""
        ...

    def choose(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen:
        """What `sparse.reference.choose` chooses for each block: `settings.rows` evenly spaced rows
        of it and all G heads score all pages before it by their sketch and the block's own keys
        (``k_pools``) exactly; shares, superblock, budget, tau as in `sparse.selection`."""
        ...

    def choose_for_last_rows(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen | None:
        """What each block's last row would choose alone, the other rows of `q_THD` being anything:
        no superblocks. None where nothing does it sooner than `masses`."""
        ...

    def masses(
        self,
        q_HD: Tensor,
        page_ids: Tensor,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Tensor:
        """Estimated log mass of full pages (int32 ids) for one query ``[heads, head_dim]``: fp32
        ``[heads, pages]``, natural log."""
        ...

    def tail(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        chosen: Chosen,
        summaries: SummaryPool,
        scale: float,
        onto: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean-field partial over the dropped pages: o fp32 ``[tokens, heads, head_dim]``, lse
        fp32 ``[tokens, heads]``; (0, -inf) where nothing was dropped and for rows in no block. It
        is merged into `onto`, a partial of the same rows, in place, where that is given."""
        ...

"""The attention primitive: the partial attention of some queries over some pages.

Chunked prefill, pass-KV, pass-Q, Ulysses, decode over remote KV and sparse attention are this one
call over different lists of pages, and `ops.merge_state` (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PagePool:
    """K and V of one layer on several ranks, as far as they can be read from here.

    Attributes:
        k, v: one tensor ``[slots, kv_heads, page_size, row]`` per SP rank, rows as `ops.kv_rows`
            has them; a rank whose memory cannot be read from here has an empty tensor (0 slots).
        slots_per_rank: page id = index in `k` * slots_per_rank + slot.
    """

    k: Sequence[Tensor]
    v: Sequence[Tensor]
    slots_per_rank: int

    @property
    def page_size(self) -> int:
        return int(next(t for t in self.k if t.numel()).shape[2])


@dataclass(frozen=True)
class QueryRun:
    """Queries at consecutive positions of one sequence, and the pages they attend to.

    Attributes:
        row, count: the run's rows [row, row + count) in the query tensor.
        position: absolute position of its first row.
        page_ids: int32 ``[n]`` pages in ascending order of position, any subset of the sequence's.
        page_positions: int32 ``[n]`` absolute position of each page's first token.
        kv_len: keys at positions >= kv_len do not exist (the last page is filled in part).
    """

    row: int
    count: int
    position: int
    page_ids: Tensor
    page_positions: Tensor
    kv_len: int


@dataclass(frozen=True)
class PageLists:
    """Lists of pages, one for each (block of queries, range of KV heads): what sparse attention
    reads. Arrays, so that a step's thousands of lists are made without a loop in Python.

    Attributes:
        items: int32 ``[n, 8]``: first row and rows of the block, position of its first row; first
            and number of its list's entries in `page_ids`; kv_len as in `QueryRun`; first and
            number of its KV heads. No (row, head) is in two items.
        page_ids, page_positions: int32 ``[entries]``, as in `QueryRun`, in any order.
        complete: every (row, head) is in an item, if only with an empty list.
        standing: the arrays stay, other values come (`AttentionBackend.refresh`); `page_ids` may
            be longer than the items' entries.
    """

    items: Tensor
    page_ids: Tensor
    page_positions: Tensor
    complete: bool = False
    standing: bool = False


@dataclass(frozen=True)
class Partial:
    """A partial attention: normalised output and its natural-log weight.

    Attributes:
        o: ``[tokens, heads, head_dim]`` in fp32; 0 where no key was seen.
        lse: ``[tokens, heads]`` fp32, ln of the sum of exp(scores); -inf where no key was seen.
    """

    o: Tensor
    lse: Tensor


class AttentionBackend(Protocol):
    """Computes partials. Implementations: `attention.cpu`, later FlashInfer and Triton.

    Attributes:
        recordable: whether `partial_lists` of complete lists and `merge` are kernel calls, which a
            recording replays (`ops.recording`).
    """

    name: str
    recordable: bool

    def partial(
        self,
        q_THD: Tensor,
        runs: Sequence[QueryRun],
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
        kv_heads: tuple[int, int] | None = None,
    ) -> Partial:
        """Attend causally (key position <= query position) over each run's pages.

        Args:
            q_THD: ``[tokens, heads, head_dim]``; head h reads KV head
                ``kv_begin + h // (heads / kv_count)`` where (kv_begin, kv_end) is `kv_heads`.
            runs: disjoint in rows; rows in no run get (0, -inf).
            window: keys at positions <= query position - window are not seen.
            kv_heads: (begin, end) of the pool's KV heads that the query heads belong to; all
                unless told.
        """
        ...

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        """As `partial`, with a list of its own for each block of queries and KV head.

        Args:
            q_THD: ``[tokens, heads, head_dim]``, all heads of the pool's KV heads; (token, head)
                pairs in no item get (0, -inf).
        """
        ...

    def refresh(self, lists: PageLists) -> bool:
        """Arrays of lists that were given to `partial_lists` hold other values now. False: what was
        recorded of them cannot be replayed with these."""
        ...

    def form(self, lists: PageLists) -> str | None:
        """Which kernels such lists take with the values that they hold now: a recording serves all
        values of its form. None: they cannot be recorded."""
        ...

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        """Merge partials of the same queries over disjoint keys, in their order, and write o into
        `out_THD` in its dtype (`ops.merge_state`).

        Args:
            partials: at least one; `o` of any float dtype, with any strides but the last.
            out_THD: like an `o`; last dim contiguous, apart from all of them.
        """
        ...

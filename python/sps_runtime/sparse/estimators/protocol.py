"""What an estimator is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from sps_runtime.sparse.summaries import Field, PageSummaries


class Estimator(Protocol):
    """Says how much of a query's attention each page would get, from summaries alone.

    Attributes:
        needs: the fields of `PageSummaries` that it reads.
    """

    needs: frozenset[Field]

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        """Estimated log of the sum over a page's tokens of exp(q.k).

        Args:
            q_KGRD: fp32 ``[kv_heads, group, rows, head_dim]`` queries of one query block, already
                scaled; all of its tokens in order, or representatives.
            pages: the pages before the block, page j being the j-th of the sequence.

        Returns:
            fp32 ``[kv_heads, group, rows, pages]``, natural log. Fewer rows, a divisor, when each
            speaks for several in sequence.
        """
        ...


@runtime_checkable
class ProbingEstimator(Estimator, Protocol):
    """One that looks at what a superblock's last block attends to before it judges the others."""

    def probed(self, q_KGRD: Tensor, k_NKBD: Tensor, counts_N: Tensor) -> Estimator:
        """What judges the superblock's blocks.

        Args:
            q_KGRD: fp32, scaled, all rows of the superblock's last block.
            k_NKBD: fp32 ``[pages, kv_heads, page_size, head_dim]`` of the sequence up to its end.
            counts_N: tokens in each page.
        """
        ...

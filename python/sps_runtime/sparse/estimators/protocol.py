"""What an estimator is."""

from __future__ import annotations

from typing import Protocol

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

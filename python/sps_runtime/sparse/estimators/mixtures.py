"""Several estimators as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.summaries import Field, PageSummaries


class Largest:
    """The largest of what others estimate: a page is missed only where all of them miss it."""

    def __init__(self, estimators: Sequence[Estimator]) -> None:
        self._estimators = tuple(estimators)
        self.needs: frozenset[Field] = frozenset().union(*(e.needs for e in self._estimators))

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        return reduce(torch.maximum, (e.log_mass(q_KGRD, pages) for e in self._estimators))

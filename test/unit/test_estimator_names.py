"""Names that a client may give must be names that a rank knows."""

from __future__ import annotations

from sps_runtime.config.attention import ESTIMATORS
from sps_runtime.sparse.estimators.registry import estimator


def test_every_estimator_that_a_request_may_name_exists() -> None:
    for name in set(ESTIMATORS.values()) - {"stride"}:  # which is a strategy, and chooses no pages
        assert estimator(name) is not None

"""Estimators by the name that a request gives (`SparseSettings.estimator`).

To add one: a class with no required arguments that is an `estimators.protocol.Estimator`, and a
line in `ESTIMATORS` (or an entry ``estimator.<name>`` of the group `sps_runtime.plugins`). Fields
of `PageSummaries` that it needs and that pages' summaries hold come from there; for any other the
pages' own keys are read, which is for comparisons on one host. One that must see all rows of a
block says so by an attribute ``whole_blocks = True``.
"""

from __future__ import annotations

from typing import cast

from sps_runtime.registry import resolve
from sps_runtime.sparse.estimators.protocol import Estimator

BLOCK = "block"
"""The one that kernels know; all others but `RANDOM` run in torch."""

RANDOM = "random"
"""Forced page sets, which cost nothing to choose."""

_HERE = "sps_runtime.sparse.estimators"

ESTIMATORS = {
    BLOCK: f"{_HERE}.bounds:SketchedKeys",
    "mean": f"{_HERE}.moments:MeanKey",
    "quest": f"{_HERE}.bounds:MinMax",
    "xattention": f"{_HERE}.patterns:Antidiagonal",
    "vertical_slash": f"{_HERE}.patterns:LastBlockPattern",
    "oracle": f"{_HERE}.bounds:ExactMass",
    "null": f"{_HERE}.patterns:Nothing",
    RANDOM: f"{_HERE}.patterns:RandomPages",
}
"""Name -> ``module:class``."""


def estimator(name: str) -> Estimator:
    """The estimator of a name.

    Raises:
        ConfigError: nobody knows it.
    """
    return cast(Estimator, resolve("estimator", ESTIMATORS, name)())


def whole_blocks(found: Estimator) -> bool:
    """Whether it must see all rows of a query block."""
    return bool(getattr(found, "whole_blocks", False))

"""The audit: what was truly dropped, on a sample, with a bound."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
RECORD = struct.Struct("<HHIff")
"""One audited query block, as `SparseCounters.audits` holds them end to end (`iter_unpack`): layer,
KV head of the model, first position of the block, then the measured dropped mass of its audited
rows, in [0, 1]: its mean over rows and query heads, and its largest."""

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class AuditReport:
    """Dropped mass of one layer and head, from sampled query blocks.

    Attributes:
        samples: how many were measured.
        mean, p95, maximum: of the sampled dropped masses.
        upper: the mean over all blocks is at most this, with the confidence asked for.
    """

    samples: int
    mean: float
    p95: float
    maximum: float
    upper: float

    def exceeds(self, max_tau: float) -> bool:
        """Whether it cannot be said that the dropped mass is within max_tau."""
        return self.upper > max_tau


def audit(taus: Sequence[float], confidence: float = 0.95) -> AuditReport:
    """Sum up dropped masses, each in [0, 1], of blocks drawn by `sampled`.

    Without samples nothing is known: the bound is 1.
    """
    if not taus:
        return AuditReport(0, 0.0, 0.0, 0.0, 1.0)
    ordered = sorted(taus)
    mean = math.fsum(ordered) / len(ordered)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    upper = mean_upper_bound(min(max(mean, 0.0), 1.0), len(ordered), confidence)
    return AuditReport(len(ordered), mean, p95, ordered[-1], upper)


def mean_upper_bound(mean: float, samples: int, confidence: float = 0.95) -> float:
    """The largest true mean under which so small a sample mean has probability 1 - confidence.

    The Chernoff bound for independent values in [0, 1] (Hoeffding 1963, theorem 1): the u above
    the mean with samples * KL(mean, u) = -log(1 - confidence). Near 0 it shrinks as 1 / samples,
    where Hoeffding's simpler one shrinks as its root.
    """
    target = -math.log(1.0 - confidence) / samples
    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _divergence(mean, middle) < target:
            low = middle
        else:
            high = middle
    return high


def _divergence(p: float, q: float) -> float:
    """KL divergence of a coin that shows heads with p from one with q."""
    if q >= 1.0:
        return 0.0 if p >= 1.0 else math.inf
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)


def sampled(seed: int, layer: int, head: int, block: int, share: float) -> bool:
    """Whether a query block is audited: the same on every rank, in every chunking."""
    layers, heads, blocks = (np.array([part]) for part in (layer, head, block))
    return bool(sampled_blocks(seed, layers, heads, blocks, share)[0])


def sampled_blocks(seed: int, layers: Ints, heads: Ints, blocks: Ints, share: float) -> Mask:
    """`sampled` of arrays that broadcast against one another."""
    name = np.array([seed], dtype=np.uint64)
    for part in (layers, heads, blocks):
        name = _mix((name + part.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    drawn: Mask = name < share * 2.0**64
    return drawn


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Well spread 64-bit numbers (splitmix64, Steele et al. 2014); products wrap."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)

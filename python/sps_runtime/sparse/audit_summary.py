"""Audited query blocks of a whole prompt, summed up for whoever asked. No torch."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from sps_runtime.sparse.audit import RECORD


@dataclass(frozen=True)
class AuditSummary:
    """Measured dropped mass over all records; None without any.

    Attributes:
        samples: (layer, query block, KV head) that were measured.
        mean, p95: of their means.
        maximum: of their largest rows.
        last: mean of the last query block that was measured.
        worst: (layer, KV head) with the largest mean.
    """

    samples: int = 0
    mean: float | None = None
    p95: float | None = None
    maximum: float | None = None
    last: float | None = None
    worst: tuple[int, int] | None = None


def summarize(records: bytes) -> AuditSummary:
    """Sum up records of `audit.RECORD`, packed end to end in any order."""
    blocks = list(RECORD.iter_unpack(records))
    if not blocks:
        return AuditSummary()
    means = sorted(block[3] for block in blocks)
    last = max(block[2] for block in blocks)
    heads: dict[tuple[int, int], list[float]] = defaultdict(list)
    for layer, head, _, mean, _ in blocks:
        heads[layer, head].append(mean)
    return AuditSummary(
        samples=len(blocks),
        mean=_mean(means),
        p95=means[min(len(means), math.ceil(0.95 * len(means))) - 1],
        maximum=max(block[4] for block in blocks),
        last=_mean([block[3] for block in blocks if block[2] == last]),
        worst=max(sorted(heads), key=lambda head: _mean(heads[head])),
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)

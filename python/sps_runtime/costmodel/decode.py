"""Where linear layers of a decode step lie best, read from what ranks measured at start.

A token may have a home rank, which reads all its weights for it, or all ranks may read a slice of
the weights for all tokens and sum what they have. Few tokens wait for memory, and slices are read
in a part of the time; each sum is a crossing that costs the same however little there is to read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sps_runtime.types.messages import DecodeCost
from sps_runtime.types.plan import Placement


def cheapest(table: DecodeCost, tokens: Sequence[int]) -> Placement:
    """The placement that takes least time; sharded where they are equal.

    Args:
        tokens: of each rank of the group.
    """
    sharded = interpolate(table.rows, table.sharded_s, max(tokens))
    replicated = replicated_seconds(table, sum(tokens), len(tokens))
    return "replicated" if replicated < sharded else "sharded"


def replicated_seconds(table: DecodeCost, tokens: int, ranks: int) -> float:
    """Seconds of a layer whose slices `ranks` ranks multiply by `tokens` tokens.

    Measured with all ranks; of fewer, each has a larger slice and the crossings cost the same.
    """
    measured = interpolate(table.rows, table.replicated_s, tokens)
    whole = interpolate(table.rows, table.sharded_s, tokens)
    return measured + whole * (1.0 / ranks - 1.0 / table.ranks)


def interpolate(rows: Sequence[int], seconds: Sequence[float], row: int) -> float:
    """Linear between measured rows and beyond the last two; never less than the first is."""
    if row <= rows[0] or len(rows) == 1:
        return seconds[0]
    right = min(bisect_left(rows, row), len(rows) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (rows[right] - rows[left])
    if row > rows[-1]:
        return seconds[-1] + max(slope, 0.0) * (row - rows[-1])
    return seconds[left] + slope * (row - rows[left])

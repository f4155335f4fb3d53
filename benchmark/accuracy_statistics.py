"""How sure a share of right answers is, and a difference of two shares of the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964


def wilson(right: int, asked: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927): (low, high), within [0, 1]."""
    if asked == 0:
        return 0.0, 1.0
    share, square = right / asked, z * z
    middle = (share + square / (2 * asked)) / (1 + square / asked)
    spread = math.sqrt(share * (1 - share) / asked + square / (4 * asked * asked))
    half = z * spread / (1 + square / asked)
    low = 0.0 if right == 0 else middle - half
    return low, 1.0 if right == asked else middle + half


def paired(a: Sequence[bool], b: Sequence[bool], z: float = Z95) -> tuple[float, float, float]:
    """The difference of shares a - b over the same questions: (difference, low, high).

    Newcombe's square-and-add interval for paired shares (1998, method 10), which keeps its coverage
    where few answers differ.

    Raises:
        ValueError: when they are not equally many.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} answers beside {len(b)}")
    n = len(a)
    if n == 0:
        return 0.0, -1.0, 1.0
    right_a, right_b = sum(a), sum(b)
    both = sum(x and y for x, y in zip(a, b, strict=True))
    share_a, share_b = right_a / n, right_b / n
    low_a, high_a = wilson(right_a, n, z)
    low_b, high_b = wilson(right_b, n, z)
    phi = _correlation(both, right_a, right_b, n)
    down_a, up_a = share_a - low_a, high_a - share_a
    down_b, up_b = share_b - low_b, high_b - share_b
    low = math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    high = math.sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    difference = share_a - share_b
    return difference, difference - low, difference + high


def _correlation(both: int, right_a: int, right_b: int, n: int) -> float:
    """Phi of the two-by-two table, with Newcombe's continuity correction where it is positive."""
    wrong_a, wrong_b = n - right_a, n - right_b
    product = right_a * right_b * wrong_a * wrong_b
    if product == 0:
        return 0.0
    only_a, only_b = right_a - both, right_b - both
    neither = n - both - only_a - only_b
    excess = both * neither - only_a * only_b
    if excess > 0:
        excess = max(excess - n / 2, 0)
    return excess / math.sqrt(product)

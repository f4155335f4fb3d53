"""Seconds of a prefill step at one degree (LoongServe's form, with cached tokens).

    T_P = A_P + B_P sum(l) + C_P density sum(l (2c + l))

l new and c cached tokens of each sequence: A is what a step costs anyhow, B the linear layers and
traffic per token, C attention, which is quadratic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Work = tuple[int, int]
"""(new tokens l, cached tokens c) of one sequence in a step."""


@dataclass(frozen=True)
class PrefillCost:
    """The three coefficients of one degree, in seconds."""

    a: float
    b: float
    c: float

    def seconds(self, works: Iterable[Work], density: float = 1.0) -> float:
        """Seconds of a step that computes `works`."""
        tokens, pairs = features(works)
        return self.a + self.b * tokens + self.c * density * pairs


def features(works: Iterable[Work]) -> tuple[int, int]:
    """sum(l) and sum(l (2c + l)): new tokens, and twice the causal pairs."""
    tokens = pairs = 0
    for new, cached in works:
        tokens += new
        pairs += new * (2 * cached + new)
    return tokens, pairs


def fit(samples: Sequence[tuple[Sequence[Work], float]]) -> PrefillCost:
    """Least squares over measured (works, seconds), each weighted by 1 / seconds.

    The weights make relative errors count, so short steps are fitted as well as long ones.
    Negative coefficients, which noise can cause, become 0 and the rest is fitted again.

    Raises:
        ValueError: fewer than three samples, or samples too alike to tell the terms apart.
    """
    if len(samples) < 3 or any(seconds <= 0 for _, seconds in samples):
        raise ValueError("a fit needs at least three samples of positive seconds")
    rows = [(1.0, *map(float, features(works))) for works, _ in samples]
    weights = [1.0 / seconds for _, seconds in samples]
    kept = [0, 1, 2]
    while True:
        solved = _solve_normal(
            [[r[k] * w for k in kept] for r, w in zip(rows, weights, strict=True)]
        )
        if min(solved) >= 0 or len(kept) == 1:
            break
        kept.pop(solved.index(min(solved)))
    coefficients = dict(zip(kept, solved, strict=True))
    return PrefillCost(*(max(0.0, coefficients.get(k, 0.0)) for k in range(3)))


def _solve_normal(rows: list[list[float]]) -> list[float]:
    """x minimising |rows x - 1|, by scaled normal equations and Gauss-Jordan with pivoting."""
    size = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]
    rows = [[value / s for value, s in zip(row, scale, strict=True)] for row in rows]
    system = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)] + [sum(row[i] for row in rows)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(system[k][i]))
        system[i], system[pivot] = system[pivot], system[i]
        if abs(system[i][i]) < 1e-12:
            raise ValueError("the samples are too alike to tell the terms apart")
        system[i] = [value / system[i][i] for value in system[i]]
        for k in range(size):
            if k != i:
                factor = system[k][i]
                system[k] = [a - factor * b for a, b in zip(system[k], system[i], strict=True)]
    return [system[i][size] / scale[i] for i in range(size)]

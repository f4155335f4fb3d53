"""The audit's bound holds, and its sample is the same for everyone."""

from __future__ import annotations

import random

import pytest

from sps_runtime.sparse.audit import audit, mean_upper_bound, sampled


def test_no_samples_bound_nothing() -> None:
    assert audit([]).upper == 1.0 and audit([]).exceeds(0.9)


def test_figures_of_a_sample() -> None:
    found = audit([0.0] * 94 + [0.1] * 5 + [0.5])
    assert found.samples == 100
    assert found.mean == pytest.approx(0.01)
    assert (found.p95, found.maximum) == (0.1, 0.5)
    assert found.mean < found.upper < 0.08


def test_without_any_dropped_mass_the_bound_is_three_over_the_samples() -> None:
    assert mean_upper_bound(0.0, 300) == pytest.approx(3.0 / 300, rel=0.02)
    assert mean_upper_bound(1.0, 3) == 1.0


@pytest.mark.parametrize("true", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("samples", [10, 60])
def test_the_bound_fails_at_most_one_time_in_twenty(true: float, samples: int) -> None:
    """Coins are the worst of all variables in [0, 1] with a given mean."""
    draw = random.Random(5)
    missed = 0
    for _ in range(1000):
        coins = [float(draw.random() < true) for _ in range(samples)]
        missed += audit(coins).upper < true
    assert missed <= 60


def test_the_sample_is_a_function_of_names_and_of_the_share_asked_for() -> None:
    names = [
        (1, layer, head, block) for layer in range(4) for head in range(4) for block in range(250)
    ]
    chosen = [sampled(*name, 0.02) for name in names]
    assert 40 <= sum(chosen) <= 130
    assert chosen == [sampled(*name, 0.02) for name in names]
    assert all(sampled(*name, 0.05) for name, was in zip(names, chosen, strict=True) if was)
    assert not any(sampled(*name, 0.0) for name in names) and all(sampled(*n, 1.0) for n in names)

"""Intervals of shares and of paired differences, against published values."""

from __future__ import annotations

import pytest

from accuracy_statistics import paired, wilson


def test_wilson_agrees_with_newcombe_1998():
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(29, 29) == (pytest.approx(0.8830, abs=1e-4), 1.0)


def test_paired_difference_agrees_with_newcombe_1998():
    """His example of 50 pairs: 36 both, 12 only the first, 2 only the second, 0 neither."""
    a = [True] * 36 + [True] * 12 + [False] * 2
    b = [True] * 36 + [False] * 12 + [True] * 2
    difference, low, high = paired(a, b)
    assert difference == pytest.approx(0.2)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


def test_paired_of_equal_answers_is_zero_and_narrow():
    difference, low, high = paired([True] * 200, [True] * 200)
    assert difference == 0.0
    assert -0.02 < low <= 0.0 <= high < 0.02


def test_paired_wants_the_same_questions():
    with pytest.raises(ValueError, match="beside"):
        paired([True], [])

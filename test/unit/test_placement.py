"""Placing pages: every page has a rank with room, and causal work is balanced."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sps_runtime.kvcache.placement import contiguous, divide, make_placement, next_owner, zigzag


@given(pages=st.integers(0, 40), room=st.lists(st.integers(0, 15), min_size=1, max_size=5))
def test_divide_is_even_within_the_room(pages: int, room: list[int]) -> None:
    quotas = divide(pages, dict(enumerate(room)))
    if pages > sum(room):
        assert quotas is None
        return
    assert sum(quotas.values()) == pages
    assert all(0 <= quotas[rank] <= room[rank] for rank in quotas)
    unfilled = [quotas[rank] for rank in quotas if quotas[rank] < room[rank]]
    if unfilled:
        assert max(quotas.values()) - min(unfilled) <= 1


@given(quotas=st.dictionaries(st.integers(0, 7), st.integers(0, 20), min_size=1))
def test_a_placement_uses_each_quota(quotas: dict[int, int]) -> None:
    quotas = dict(sorted(quotas.items()))
    for place in (zigzag, contiguous):
        counts = Counter(place(quotas))
        assert all(counts[rank] == count for rank, count in quotas.items())


def test_zigzag_balances_causal_work() -> None:
    order = zigzag(dict.fromkeys(range(4), 16))
    work = Counter()
    for position, rank in enumerate(order):
        work[rank] += position
    assert len(set(work.values())) == 1
    assert make_placement("zigzag") is zigzag


def test_decode_pages_stay_with_owners_while_they_can() -> None:
    assert next_owner([0, 1], [2, 5, 9]) == 1
    assert next_owner([0, 1], [0, 0, 9]) == 2
    assert next_owner([], [1, 4, 2]) == 1
    assert next_owner([0], [0, 0, 0]) is None

"""Placing pages: every page has a rank with room, and causal work is balanced."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from sps_runtime.kvcache.placement import (
    contiguous,
    divide,
    divide_units,
    make_placement,
    next_owner,
    zigzag,
)


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


@given(st.lists(st.integers(1, 8), min_size=1, max_size=40), st.integers(1, 8), st.booleans())
def test_units_are_dealt_whole_and_by_pages(
    sizes: list[int], ranks: int, side_by_side: bool
) -> None:
    place = contiguous if side_by_side else zigzag
    owners = divide_units(sizes, dict.fromkeys(range(ranks), 8 * len(sizes)), place)
    assert len(owners) == sum(sizes)
    ends = list(accumulate(sizes))
    units = [owners[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    assert all(len(set(unit)) == 1 for unit in units)
    loads = [owners.count(rank) for rank in range(ranks)]
    by_number = divide(len(sizes), dict.fromkeys(range(ranks), len(sizes)))
    assert by_number is not None
    assert max(loads) <= max(by_number.values()) * max(sizes)


def test_ranks_get_the_same_tokens_where_late_superblocks_are_longer() -> None:
    owners = divide_units([16] * 16 + [32] * 8, dict.fromkeys(range(4), 512), contiguous)
    assert [owners.count(rank) for rank in range(4)] == [128] * 4
    assert owners == sorted(owners)

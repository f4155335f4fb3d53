"""Grouping lists by their leading pages, against all groupings there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sps_runtime.attention.shared_prefix import ReadCost, SharedPrefix, shared_prefixes

Lists = Sequence[Sequence[int]]

PAGES = st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=7)
COSTS = st.builds(ReadCost, st.just(10), st.integers(0, 25), st.integers(0, 60))


def group(lists: Lists, cost: ReadCost, most: int | None = None) -> list[SharedPrefix]:
    """`shared_prefixes` of lists that lie apart, with entries of nobody's between them."""
    flat, begin = [9], []
    for pages in lists:
        begin.append(len(flat))
        flat += [*pages, 9, 9]
    limit = np.array([len(pages) for pages in lists], dtype=np.int64)
    return shared_prefixes(np.array(flat), np.array(begin, dtype=np.int64), limit, cost, most)


def nodes(lists: Lists) -> dict[tuple[int, ...], int]:
    """Every set of two lists or more that begins alike and is all that does -> how many pages."""
    found: dict[tuple[int, ...], int] = {}
    for pages in lists:
        for depth in range(1, len(pages) + 1):
            head = list(pages[:depth])
            members = tuple(i for i, other in enumerate(lists) if list(other[:depth]) == head)
            if len(members) > 1:
                found[members] = max(found.get(members, 0), depth)
    return found


def choices(
    possible: list[tuple[tuple[int, ...], int]], used: frozenset[int] = frozenset()
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    yield []
    for i, (members, pages) in enumerate(possible):
        if not used & set(members):
            for rest in choices(possible[i + 1 :], used | set(members)):
                yield [(members, pages), *rest]


@given(PAGES, COSTS)
@settings(max_examples=300, deadline=None)
def test_best_of_all_groupings(lists: Lists, cost: ReadCost) -> None:
    found = group(lists, cost)
    possible = nodes(lists)
    best = max(
        sum(cost.saved(len(members), pages) for members, pages in chosen)
        for chosen in choices(list(possible.items()))
    )
    saved = sum(one.saved_bytes for one in found)
    assert saved == (best if best > 0 and best >= cost.least_bytes else 0)
    seen: set[int] = set()
    for one in found:
        assert one.saved_bytes == cost.saved(len(one.members), one.pages) > 0
        assert possible[one.members] == one.pages
        assert not seen & set(one.members)
        seen |= set(one.members)


@given(PAGES, COSTS, st.integers(1, 3))
def test_few_groups_are_those_that_save_most(lists: Lists, cost: ReadCost, most: int) -> None:
    free = ReadCost(cost.page_bytes, cost.row_bytes)
    every, few = group(lists, free), group(lists, free, most)
    assert few == every[:most]
    saved = [one.saved_bytes for one in every]
    assert saved == sorted(saved, reverse=True)


def test_a_program_and_its_branches() -> None:
    """Three branches behind 40 pages, two behind 30 others; all five behind one system page."""
    program = [[0, *range(100, 140), 200 + i] for i in range(3)]
    other = [[0, *range(300, 330), 400 + i, 500 + i] for i in range(2)]
    found = group([other[0], *program, other[1], [7]], ReadCost(1))
    assert [(one.members, one.pages) for one in found] == [((1, 2, 3), 41), ((0, 4), 31)]


def test_too_little_is_left_alone() -> None:
    lists = [[1, 2, 3, 4], [1, 2, 3, 5]]
    assert group(lists, ReadCost(10, least_bytes=30))[0].pages == 3
    assert group(lists, ReadCost(10, least_bytes=31)) == []
    assert group(lists, ReadCost(10, row_bytes=15)) == []
    assert not any(group(lists, ReadCost(10)) for lists in ([], [[], []], [[1]], [[1, 2], [2, 1]]))


def test_page_ids_of_any_size() -> None:
    """Lexicographic order is that of numbers, not of their bytes as they lie in memory."""
    big = 2**31 - 1
    lists = [[256, 1], [1, 256], [big, 5], [256, 2], [big, 5], [1, 255]]
    found = group(lists, ReadCost(1))
    assert {(one.members, one.pages) for one in found} == {((2, 4), 2), ((0, 3), 1), ((1, 5), 1)}


def test_many_lists() -> None:
    """A chain as deep as there are lists is walked without recursion."""
    n = 3000
    flat = np.arange(n)
    limit = np.arange(1, n + 1)
    found = shared_prefixes(flat, np.zeros(n, dtype=np.int64), limit, ReadCost(1))
    assert len(found) == 1 and found[0].saved_bytes >= (n // 2 - 1) * n // 2

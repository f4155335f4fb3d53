"""Which rank of a group gets which new pages.

A token is computed where its page lies, so placing pages divides the work. Causal attention over a
chunk costs more the later the token: in zigzag order (striped or "zigzag" ring attention) rank i of
P holds block i and block 2P - 1 - i, and every rank has the same tokens and the same attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Protocol

from sps_runtime.registry import resolve

PLACEMENTS = {
    "zigzag": "sps_runtime.kvcache.placement:zigzag",
    "contiguous": "sps_runtime.kvcache.placement:contiguous",
}


class PlacementPolicy(Protocol):
    """Orders the pages of a chunk, given how many each rank gets."""

    def __call__(self, quotas: Mapping[int, int]) -> list[int]:
        """Return the rank of each page in order of position; rank r occurs quotas[r] times."""
        ...


def make_placement(name: str) -> PlacementPolicy:
    """The placement called `name`. Raises ConfigError for a name nobody knows."""
    policy: PlacementPolicy = resolve("placement", PLACEMENTS, name)
    return policy


def zigzag(quotas: Mapping[int, int]) -> list[int]:
    """Ranks ascending with half of their pages each, then descending with the other half."""
    pairs = list(quotas.items())
    rising = [rank for rank, count in pairs for _ in range((count + 1) // 2)]
    falling = [rank for rank, count in reversed(pairs) for _ in range(count // 2)]
    return rising + falling


def contiguous(quotas: Mapping[int, int]) -> list[int]:
    """One block per rank, ascending."""
    return [rank for rank, count in quotas.items() for _ in range(count)]


def divide(pages: int, room: Mapping[int, int]) -> dict[int, int] | None:
    """Divide `pages` over ranks as evenly as their `room` (pages each can give) allows.

    Ranks with little room give all they have, and the others share the rest; what does not divide
    goes to the ranks named first. None when the ranks have too little room together.
    """
    quotas = dict.fromkeys(room, 0)
    if pages > sum(room.values()):
        return None
    while pages:
        open_ranks = [rank for rank in room if quotas[rank] < room[rank]]
        share = max(1, pages // len(open_ranks))
        for rank in open_ranks:
            take = min(share, room[rank] - quotas[rank], pages)
            quotas[rank] += take
            pages -= take
    return quotas


def divide_units(
    sizes: Sequence[int], room: Mapping[int, int], place: PlacementPolicy
) -> list[int]:
    """The rank of each page of units that must not be divided: superblocks of sparse attention.

    Units are dealt so that the rank with most pages has as few as they allow: by number, or, where
    they differ in size, by where the middle of each lies among all pages.

    Args:
        sizes: pages of each unit, in order of position.
        room: pages that each rank can give.
        place: orders units as it orders pages.

    Returns:
        The ranks of the pages of the first units, as many units as surely fit; perhaps none.
    """
    for count in range(len(sizes), 0, -1):
        first = sizes[:count]
        quotas = divide(count, {rank: pages // max(first) for rank, pages in room.items()})
        if quotas is not None:
            by_number = place(quotas)
            by_middle = _by_middle(first, place(dict.fromkeys(room, 2)))
            dealt = min(by_number, by_middle, key=lambda ranks: _most(ranks, first, room))
            return [rank for rank, size in zip(dealt, first, strict=True) for _ in range(size)]
    return []


def _by_middle(sizes: Sequence[int], stretches: Sequence[int]) -> list[int]:
    """The rank of each unit, where `stretches` are the ranks of equal stretches of all pages."""
    twice = 2 * sum(sizes)
    ends = accumulate(sizes)
    return [
        stretches[(2 * end - size) * len(stretches) // twice]
        for end, size in zip(ends, sizes, strict=True)
    ]


def _most(ranks: Sequence[int], sizes: Sequence[int], room: Mapping[int, int]) -> float:
    """Pages of the rank that gets most; infinite where one lacks room."""
    pages = dict.fromkeys(room, 0)
    for rank, size in zip(ranks, sizes, strict=True):
        pages[rank] += size
    return inf if any(pages[rank] > room[rank] for rank in room) else max(pages.values())


def next_owner(owners: Sequence[int], room: Sequence[int]) -> int | None:
    """The rank that gets a sequence's next page in decode: the owner with most room.

    Queries travel to every owner anyway, so a page on an owner widens no group; only when no owner
    has room does another rank take it. None when no rank has room.
    """
    best = max(owners, key=lambda rank: room[rank], default=None)
    if best is None or room[best] == 0:
        best = max(range(len(room)), key=lambda rank: room[rank])
    return best if room[best] else None

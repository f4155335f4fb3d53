"""Which cached prefix goes first when pages run short."""

from __future__ import annotations

from typing import Protocol

from sps_runtime.registry import resolve

EVICTIONS = {"lru": "sps_runtime.kvcache.eviction:Lru"}


class Evictable(Protocol):
    """What an eviction policy may know of a leaf of the radix tree.

    Attributes:
        used: the tree's tick when a sequence last held the node; ticks only grow.
    """

    used: int


class Eviction(Protocol):
    """Orders leaves nobody holds."""

    def key(self, leaf: Evictable) -> float:
        """The leaf with the smallest key goes first; asked when it becomes evictable."""
        ...


class Lru:
    """Least recently used first."""

    def key(self, leaf: Evictable) -> float:
        return leaf.used


def make_eviction(name: str) -> Eviction:
    """The eviction policy called `name`. Raises ConfigError for a name nobody knows."""
    policy: Eviction = resolve("eviction", EVICTIONS, name)()
    return policy

"""Requests that wait for their turn."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from sps_runtime.scheduler.sequence import Sequence
from sps_runtime.types.errors import ConfigError

LPM_LONGEST_QUEUE = 128
"""Beyond this many waiting, matching all prefixes costs more than the order is worth (SGLang)."""

PATIENCE = 64
"""A request overtaken this often goes before all others: `lpm` starves nobody."""


class WaitingQueue:
    """A bounded queue in order of arrival; a retracted request returns to its old place.

    `fcfs` serves by arrival, `lpm` the longest cached prefix first.
    """

    def __init__(self, order: str, bound: int) -> None:
        if order not in ("fcfs", "lpm"):
            raise ConfigError(f"unknown schedule_policy {order!r}; known: fcfs, lpm")
        self._order = order
        self._bound = bound
        self._waiting: list[Sequence] = []
        self._arrivals: set[int] = set()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.arrival in self._arrivals

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._bound

    @property
    def awaiting(self) -> int:
        """How many wait for a prefix that a run computes."""
        return sum(s.awaited is not None and not s.awaited.over for s in self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at its place by arrival."""
        self._arrivals.add(sequence.arrival)
        insort(self._waiting, sequence, key=lambda waiting: waiting.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Raises KeyError when it does not wait."""
        self._arrivals.remove(sequence.arrival)
        self._waiting.remove(sequence)

    def ordered(self, matched: Callable[[Sequence], int]) -> list[Sequence]:
        """A snapshot in serving order; `matched` tells a sequence's cached tokens."""
        if self._order == "fcfs" or len(self._waiting) > LPM_LONGEST_QUEUE:
            return list(self._waiting)
        return sorted(
            self._waiting,
            key=lambda s: (s.overtaken < PATIENCE, 0 if s.overtaken >= PATIENCE else -matched(s)),
        )

    def take(self, sequence: Sequence) -> None:
        """Remove an admitted sequence; those before it were overtaken."""
        self.remove(sequence)
        for waiting in self._waiting:
            if waiting.arrival > sequence.arrival:
                break
            waiting.overtaken += 1

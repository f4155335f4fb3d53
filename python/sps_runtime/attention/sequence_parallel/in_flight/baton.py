"""Who computes: threads that share one core and lend it while they wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Baton:
    """One thread computes at a time: of those that can go on, the one in the earliest layer, and
    there the earliest block, for which others wait.

    Attributes:
        changed: told whenever somebody else may go on.
        waiting: turns of those that want to compute.
        idle_s: seconds in which nobody computed.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.idle_s = 0.0
        self._holder: tuple[int, int] | None = None
        self.waiting: set[tuple[int, int]] = set()
        self._idle_since = time.monotonic()
        self._failed = False

    def expect(self, turns: Iterable[tuple[int, int]]) -> None:
        """Turns that threads will take which have not begun yet: none goes before its turn."""
        with self.changed:
            self.waiting.update(turns)

    def take(self, turn: tuple[int, int]) -> None:
        """Wait for the right to compute; `turn` is (layer, block)."""
        with self.changed:
            self.waiting.add(turn)
            self.changed.wait_for(lambda: self._failed or self._is_next(turn))
            self.waiting.discard(turn)
            self.check()
            self.idle_s += time.monotonic() - self._idle_since
            self._holder = turn

    def give(self) -> None:
        """Let another compute."""
        with self.changed:
            self._holder = None
            self._idle_since = time.monotonic()
            self.changed.notify_all()

    def offer(self, turn: tuple[int, int]) -> None:
        """Let those go first who want to and stand before this turn."""
        with self.changed:
            if not self.waiting or turn < min(self.waiting):
                return
        self.give()
        self.take(turn)

    @contextmanager
    def lent(self, turn: tuple[int, int]) -> Iterator[None]:
        """Lend the core to others while the body waits for something that computes nothing."""
        self.give()
        yield
        self.take(turn)

    def fail(self) -> None:
        """Wake everyone who waits: a block has failed."""
        with self.changed:
            self._failed = True
            self.changed.notify_all()

    def check(self) -> None:
        """Raise ConnectionError when another block has failed."""
        if self._failed:
            raise ConnectionError("another micro-batch of the step failed")

    def _is_next(self, turn: tuple[int, int]) -> bool:
        return self._holder is None and min(self.waiting) == turn

"""A timeline of steps that anyone can look at: Chrome's trace events, which Perfetto opens.

All processes of an engine append to one file. Each event is a line and leaves in one ``write`` of a
descriptor opened for appending, so lines of several processes do not mix. The clock is
CLOCK_MONOTONIC, which processes of a host share. The array is closed when the server ends in order;
viewers also open one that is not.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

FLUSH_BYTES = 1 << 16
OTHER_PROCESSES = 1000
"""Process numbers in the file: ranks have their own number, the others follow from here."""


class Timeline(Protocol):
    """Where spans go.

    Attributes:
        on: whether anybody looks; callers that would do work for a span ask first.
    """

    on: bool

    def span(self, name: str, category: str, **details: Any) -> AbstractContextManager[None]:
        """The time of a ``with`` block. Spans of one thread nest.

        Args:
            details: shown beside the span, JSON values.
        """
        ...

    def record(self, on: bool) -> None:
        """Go on, or pause and write what was gathered."""
        ...

    def add(self, name: str, category: str, began_ns: int, ended_ns: int) -> None:
        """A span that was timed elsewhere, by CLOCK_MONOTONIC, inside of those that are open."""
        ...

    def flush(self) -> None:
        """Write what was gathered."""
        ...


class NoTimeline:
    """Nobody looks."""

    on = False

    def span(self, name: str, category: str, **details: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, on: bool) -> None:
        return

    def add(self, name: str, category: str, began_ns: int, ended_ns: int) -> None:
        return

    def flush(self) -> None:
        return


class TraceFile:
    """One process's end of the file.

    Args:
        path: made by `create`.
        number: of the process in the viewer; ranks come first.
        name: of the process in the viewer.
    """

    on = True

    def __init__(self, path: str | Path, number: int, name: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._number = number
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._bytes = 0
        self._paused = False
        self._threads = {threading.current_thread().name: 0}
        common = {"ph": "M", "pid": number, "tid": 0}
        self._add({**common, "name": "process_name", "args": {"name": name}})
        self._add({**common, "name": "process_sort_index", "args": {"sort_index": number}})
        self.flush()

    @contextmanager
    def span(self, name: str, category: str, **details: Any) -> Iterator[None]:
        if self._paused:
            yield
            return
        began = time.monotonic_ns()
        try:
            yield
        finally:
            event = self._event(name, category, began, time.monotonic_ns())
            self._add({**event, "args": details} if details else event)

    def add(self, name: str, category: str, began_ns: int, ended_ns: int) -> None:
        if not self._paused:
            self._add(self._event(name, category, began_ns, ended_ns))

    def record(self, on: bool) -> None:
        self._paused = not on
        self.flush()

    def flush(self) -> None:
        with self._lock:
            lines, self._lines, self._bytes = self._lines, [], 0
            if lines:
                os.write(self._fd, "".join(lines).encode())

    def close(self) -> None:
        """Write the rest and close."""
        self.flush()
        os.close(self._fd)

    def _event(self, name: str, category: str, began_ns: int, ended_ns: int) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": self._number,
            "tid": self._thread(),
            "ts": began_ns / 1e3,
            "dur": (ended_ns - began_ns) / 1e3,
        }

    def _thread(self) -> int:
        """A row of its own for each name that threads have: those of every step have the same."""
        name = threading.current_thread().name
        with self._lock:
            known = name in self._threads
            number = self._threads.setdefault(name, len(self._threads))
        if not known:
            common = {"ph": "M", "pid": self._number, "tid": number}
            self._add({**common, "name": "thread_name", "args": {"name": name}})
        return number

    def _add(self, event: dict[str, Any]) -> None:
        line = json.dumps(event, separators=(",", ":")) + ",\n"
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
            full = self._bytes >= FLUSH_BYTES
        if full:
            self.flush()


def create(path: str | Path) -> None:
    """Begin an empty timeline, over an old one if there is one.

    Raises:
        OSError: when it cannot be written.
    """
    Path(path).write_text("[\n", encoding="utf-8")


def finish(path: str | Path) -> None:
    """Close the array, when all processes have ended."""
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"ph":"M","name":"end","pid":0,"tid":0}]\n')


def open_timeline(path: str, number: int, name: str) -> Timeline:
    """This process's end of the timeline; one that writes nothing where `path` is empty."""
    return TraceFile(path, number, name) if path else NoTimeline()


def traced(timeline: Timeline, name: str, category: str, call: Callable[P, R]) -> Callable[P, R]:
    """`call` with a span around every call."""

    def with_span(*args: P.args, **kwargs: P.kwargs) -> R:
        with timeline.span(name, category):
            return call(*args, **kwargs)

    return with_span

"""Wait for what can happen to a family of processes, without polling."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sps_runtime.ipc.process import Child, ChildStatus


@dataclass(frozen=True)
class Said:
    """A child sent a status line."""

    child: Child
    status: ChildStatus


@dataclass(frozen=True)
class Died:
    """A child ended; `code` as `subprocess` gives it (negative: by a signal)."""

    child: Child
    code: int

    @property
    def how(self) -> str:
        if self.code < 0:
            return f"{self.child.name} was ended by {signal.Signals(-self.code).name}"
        return f"{self.child.name} exited with status {self.code}"


@dataclass(frozen=True)
class Signalled:
    """This process got a signal."""

    number: int


@dataclass(frozen=True)
class Woken:
    """`Watch.wake` was called."""


Event = Said | Died | Signalled | Woken


class Watch:
    """Collects events of children, signals, and wake-ups from other threads."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._selector.register(self._read, selectors.EVENT_READ)

    def add(self, child: Child) -> None:
        for descriptor in (child.pidfd, child.status_fd):
            self._selector.register(descriptor, selectors.EVENT_READ, child)

    def wake(self) -> None:
        """Make `wait` return a `Woken`; from any thread."""
        self._write.send(b"\0")

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what happened, at most `timeout_s` later; status lines come before deaths."""
        ready = [key for key, _ in self._selector.select(timeout_s)]
        events = self._wake_ups() if any(key.data is None for key in ready) else []
        for child in dict.fromkeys(key.data for key in ready if key.data is not None):
            events += [Said(child, status) for status in child.read_status()]
        for key in ready:
            if key.data is not None and key.fd == key.data.pidfd:
                self._forget(key.data)
                events.append(Died(key.data, key.data.process.wait()))
        return events

    def wait_for_deaths(self, children: Iterable[Child], timeout_s: float) -> bool:
        """Wait until all of `children` ended; False when some did not in time."""
        end = time.monotonic() + timeout_s
        waiting = list(children)
        while waiting := [child for child in waiting if child.process.poll() is None]:
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.wait(min(left, 0.2))
        return True

    def close(self) -> None:
        self._selector.close()
        self._read.close()
        self._write.close()

    @contextmanager
    def signals(self, *numbers: int) -> Iterator[None]:
        """Turn these signals into `Signalled` events; in the main thread."""
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wake_ups(self) -> list[Event]:
        numbers = self._read.recv(4096)
        return [Signalled(number) if number else Woken() for number in numbers]

    def _forget(self, child: Child) -> None:
        for descriptor in (child.pidfd, child.status_fd):
            self._selector.unregister(descriptor)

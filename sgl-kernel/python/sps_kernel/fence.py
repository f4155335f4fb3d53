"""Fences: words in shared memory that one process publishes and others wait for.

A *word* is one element of a one-dim contiguous array of int32, uint32, int64 or uint64: a NumPy
array or memoryview over a mapped memfd, or a tensor. Values are compared as unsigned and must not
be negative. A 64-bit word must grow by less than 2^32 between two looks of a sleeping waiter.
"""

from __future__ import annotations

from sps_kernel import _core
from sps_kernel.arrays import Array


def store_release(buf: Array, index: int, value: int) -> None:
    """Store ``value``; what this thread wrote before is visible to who acquires it.

    Does not wake sleepers: see :func:`publish`.
    """
    _core.store_release(buf, index, value)


def load_acquire(buf: Array, index: int) -> int:
    """Load the word; what was written before its release-store is visible afterwards."""
    return _core.load_acquire(buf, index)


def fetch_max(buf: Array, index: int, value: int) -> int:
    """Raise the word to ``value`` if that is larger; returns what it was."""
    return _core.fetch_max(buf, index, value)


def fetch_add(buf: Array, index: int, value: int) -> int:
    """Add ``value`` to the word (modulo its width); returns what it was."""
    return _core.fetch_add(buf, index, value)


def publish(buf: Array, index: int, value: int) -> None:
    """:func:`store_release`, then :func:`wake`: the usual way to pass a fence."""
    _core.publish(buf, index, value)


def wait_at_least(
    buf: Array, index: int, value: int, spin_us: float = 0.0, timeout_s: float = -1.0
) -> bool:
    """Wait until the word is at least ``value`` (acquire); the GIL is released.

    Spins for ``spin_us`` microseconds, then sleeps on a futex that any process mapping the same
    memory wakes with :func:`publish` or :func:`wake`; without a wake it looks again every 50 ms.
    Use ``spin_us=0`` when there are more ranks than cores. Returns False after ``timeout_s``
    seconds (never when negative). A signal's Python handler runs while it sleeps, and what the
    handler raises ends the wait.

    Raises
    ------
    ValueError
        Not an array of 32- or 64-bit integers, index out of range, value does not fit.
    """
    return _core.wait_at_least(buf, index, value, spin_us, timeout_s)


def wake(buf: Array, index: int) -> None:
    """Wake every process sleeping on the word."""
    _core.wake(buf, index)

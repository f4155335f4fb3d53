"""The machine's floors as a `Floor`."""

from __future__ import annotations

from harness import floors
from peers.maths import Floor


def measure(threads: int) -> Floor:
    """`harness.floors`, the one probe of all benchmarks."""
    return Floor(**floors(threads))

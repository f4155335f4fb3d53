"""A process's sign of life in shared memory: cheap to write, readable when the process is stuck."""

from __future__ import annotations

import struct
import time

from sps_runtime.ipc.memory import map_memory

HEARTBEAT_BYTES = 64
_STAMP = struct.Struct("=q")


class Heartbeat:
    """One int64: when its writer last turned its loop (CLOCK_MONOTONIC, the same for all processes
    of a host); 0 before the first beat.

    Args:
        descriptor: a memfd of `HEARTBEAT_BYTES`.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = map_memory(descriptor)

    def beat(self) -> None:
        _STAMP.pack_into(self._memory, 0, time.monotonic_ns())

    def age_s(self) -> float | None:
        """Seconds since the last beat, None before the first."""
        (stamp,) = _STAMP.unpack_from(self._memory, 0)
        return None if stamp == 0 else (time.monotonic_ns() - stamp) / 1e9

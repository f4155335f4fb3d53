"""Fences per layer: a rank's KV of a layer may be read in place once its fence says so.

Each global rank owns one int64, ``epoch * (layers + 1) + layer + 1``. It stores it after the KV of
that layer lies in its pool, and readers wait until it is at least what they need. Epochs grow and
layers ascend, so the value only grows and "at least" is enough: a writer that is already further
has written more, never less.

Why a plain store is a release here, and a plain load an acquire: on x86 stores become visible in
program order and loads are not reordered with loads (TSO), an aligned 8-byte store by numpy is one
``mov``, and the interpreter does not reorder the calls before it. The KV copy is finished when the
call returned (glibc ends its non-temporal copies with ``sfence``). Elsewhere `SharedLayerFence`
refuses to start.
"""

from __future__ import annotations

import platform
import threading
import time
from mmap import mmap
from typing import Protocol

import numpy as np

from sps_runtime.distributed.futex import Futex
from sps_runtime.distributed.regions import LINE, fence_bytes


class LayerFence(Protocol):
    """What a rank publishes of its own KV, and waits for of its peers'."""

    def publish(self, epoch: int, layer: int) -> None:
        """This rank's new KV of `layer` of plan `epoch` lies in its pool."""
        ...

    def wait(self, global_rank: int, epoch: int, layer: int) -> float:
        """Return once `global_rank` has published that, with the seconds waited.

        Raises:
            ConnectionError: when it does not in time.
        """
        ...


class SharedLayerFence:
    """Fences of a host's ranks in one shared region.

    Args:
        memory: `regions.fence_bytes(world_size)` bytes, shared by all ranks, zero at first.
        rank: this global rank.
        layers: layers of the model.
        timeout_s: how long a peer may take.
        spin_s: how long a wait polls before it sleeps; 0 where ranks outnumber cores, since a
            polling rank there takes the core that the awaited one needs.
    """

    def __init__(
        self,
        memory: mmap,
        rank: int,
        world_size: int,
        layers: int,
        *,
        timeout_s: float = 60.0,
        spin_s: float = 0.0,
    ) -> None:
        if platform.machine() != "x86_64":
            raise OSError(f"plain stores are no fences on {platform.machine()}")
        words = np.frombuffer(memory, dtype=np.int64, count=fence_bytes(world_size) // 8)
        self._values = words[:: LINE // 8]
        self._base = int(words.ctypes.data)
        self._rank = rank
        self._layers = layers
        self._timeout_s = timeout_s
        self._spin_s = spin_s
        self._futex = Futex()

    def publish(self, epoch: int, layer: int) -> None:
        self._values[self._rank] = epoch * (self._layers + 1) + layer + 1
        self._futex.wake(self._base + self._rank * LINE)

    def wait(self, global_rank: int, epoch: int, layer: int) -> float:
        target = epoch * (self._layers + 1) + layer + 1
        values = self._values
        if values[global_rank] >= target:
            return 0.0
        began = time.monotonic()
        while (polled := time.monotonic() - began) < self._spin_s:
            if values[global_rank] >= target:
                return polled
        while (seen := int(values[global_rank])) < target:
            left = began + self._timeout_s - time.monotonic()
            if left <= 0:
                raise ConnectionError(f"rank {global_rank} did not reach layer {layer} in time")
            # The low half changes with every publish: the value grows by less than 2**32 a time.
            self._futex.wait(self._base + global_rank * LINE, seen, min(left, 1.0))
        return time.monotonic() - began


class ThreadFences:
    """Fences of ranks that are threads of one process; `of(rank)` is one rank's."""

    def __init__(self, world_size: int, layers: int, *, timeout_s: float = 60.0) -> None:
        self.values = [0] * world_size
        self.changed = threading.Condition()
        self.layers = layers
        self.timeout_s = timeout_s

    def of(self, rank: int) -> ThreadLayerFence:
        return ThreadLayerFence(self, rank)


class ThreadLayerFence:
    """One thread rank's `LayerFence`."""

    def __init__(self, fences: ThreadFences, rank: int) -> None:
        self._fences = fences
        self._rank = rank

    def publish(self, epoch: int, layer: int) -> None:
        fences = self._fences
        with fences.changed:
            fences.values[self._rank] = epoch * (fences.layers + 1) + layer + 1
            fences.changed.notify_all()

    def wait(self, global_rank: int, epoch: int, layer: int) -> float:
        fences = self._fences
        target = epoch * (fences.layers + 1) + layer + 1
        began = time.monotonic()
        with fences.changed:
            reached = fences.changed.wait_for(
                lambda: fences.values[global_rank] >= target, fences.timeout_s
            )
        if not reached:
            raise ConnectionError(f"rank {global_rank} did not reach layer {layer} in time")
        return time.monotonic() - began


class NoFence:
    """The fence of a rank that nobody reads in place."""

    def publish(self, epoch: int, layer: int) -> None:
        return

    def wait(self, global_rank: int, epoch: int, layer: int) -> float:
        raise ValueError("this rank's peers cannot be read in place")

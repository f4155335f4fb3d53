"""Messages between processes of one host: a ring of bytes per directed pair of ranks, in a memfd.

A ring's sender counts bytes produced, its receiver bytes consumed; each counter has one writer and
a cache line of its own. A message longer than a ring goes in pieces, so neither side needs room for
all of it, and an exchange with several members moves whatever can be moved until all is done.

Who can move nothing sleeps on its *doorbell*, a futex word that peers change: each peer owns a byte
of it, so that no atomic addition is needed and no ring is lost. Plain stores are enough in between
for the reason told in `distributed.fences`. A rank spins before sleeping only where ranks do not
outnumber cores.
"""

from __future__ import annotations

import platform
import time
from functools import cache, partial
from mmap import mmap

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Pending, Traffic
from sps_runtime.distributed.exchange import CarrierCommunicator, Done
from sps_runtime.distributed.futex import Futex
from sps_runtime.distributed.regions import LINE, doorbell_bytes, link_bytes

RING_BYTES = 1 << 20
_WORD = 4

Bytes = npt.NDArray[np.uint8]


class _Ring:
    """One direction between two ranks."""

    def __init__(self, memory: Bytes, ring_bytes: int) -> None:
        self._produced = memory[:8].view(np.int64)
        self._consumed = memory[LINE : LINE + 8].view(np.int64)
        self._data = memory[2 * LINE : 2 * LINE + ring_bytes]
        self._size = ring_bytes
        self._piece = max(1, ring_bytes // 4)

    def push(self, source: Bytes) -> int:
        """Put the beginning of `source` in, as much as there is room for; return how much. At most
        a quarter of the ring at once, so that the receiver copies while the sender does."""
        produced = int(self._produced[0])
        room = self._size - (produced - int(self._consumed[0]))
        count = min(room, len(source), self._piece)
        if count:
            self._copy(produced, source[:count], into_ring=True)
            self._produced[0] = produced + count
        return count

    def pull(self, target: Bytes) -> int:
        """Take what is there, up to `target`'s length; return how much."""
        consumed = int(self._consumed[0])
        count = min(int(self._produced[0]) - consumed, len(target))
        if count:
            self._copy(consumed, target[:count], into_ring=False)
            self._consumed[0] = consumed + count
        return count

    def _copy(self, at: int, other: Bytes, *, into_ring: bool) -> None:
        begin = at % self._size
        first = min(len(other), self._size - begin)
        for ring, part in (
            (self._data[begin : begin + first], other[:first]),
            (self._data[: len(other) - first], other[first:]),
        ):
            if into_ring:
                ring[:] = part
            else:
                part[:] = ring


class SharedMemoryMailroom:
    """One rank's `Mailroom` and `Carrier`: its rings and doorbell.

    Args:
        memory: ``regions.link_bytes(world_size, ring_bytes)`` bytes, shared by all ranks, zero at
            first.
        rank: this global rank.
        traffic: where to count.
        timeout_s: how long nothing may move.
        spin_s: how long a wait polls before it sleeps; 0 where ranks outnumber cores.
    """

    recordable = False

    def __init__(
        self,
        memory: mmap,
        rank: int,
        world_size: int,
        traffic: Traffic,
        *,
        ring_bytes: int = RING_BYTES,
        timeout_s: float = 60.0,
        spin_s: float = 0.0,
    ) -> None:
        if platform.machine() != "x86_64":
            raise OSError(f"plain stores are no fences on {platform.machine()}")
        self.rank = rank
        self.traffic = traffic
        self.timeout_s = timeout_s
        self._spin_s = spin_s
        everything = np.frombuffer(memory, dtype=np.uint8, count=link_bytes(world_size, ring_bytes))
        bells = everything[: doorbell_bytes(world_size)].reshape(world_size, -1)
        self._bells = bells
        self._words = bells[rank].view(np.uint32)
        rings = everything[doorbell_bytes(world_size) :].reshape(world_size, world_size, -1)
        self._out = [_Ring(rings[rank, peer], ring_bytes) for peer in range(world_size)]
        self._in = [_Ring(rings[peer, rank], ring_bytes) for peer in range(world_size)]
        self._futex = Futex()
        self._communicator = cache(partial(CarrierCommunicator, self))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)

    def start(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int) -> Pending:
        """All of `move`: there is nothing to hide."""
        self.move(outgoing, incoming)
        return Done()

    def move(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        """Raises ConnectionError when nothing moved for `timeout_s`."""
        self._move(
            {peer: data.numpy() for peer, data in outgoing.items()},
            {peer: data.numpy() for peer, data in incoming.items()},
        )

    def _move(self, outgoing: dict[int, Bytes], incoming: dict[int, Bytes]) -> None:
        """Both dicts are emptied on the way."""
        moved_at = time.monotonic()
        while outgoing or incoming:
            seen = self._words.copy()
            if self._pass(outgoing, incoming):
                moved_at = time.monotonic()
                continue
            if time.monotonic() - moved_at > self.timeout_s:
                waiting = sorted({*outgoing, *incoming})
                raise ConnectionError(f"ranks {waiting} did not answer rank {self.rank} in time")
            self._wait(seen, {*outgoing, *incoming})

    def _pass(self, outgoing: dict[int, Bytes], incoming: dict[int, Bytes]) -> bool:
        """Move what can be moved now; whether anything did."""
        moved = False
        for peer, data in list(outgoing.items()):
            count = self._out[peer].push(data)
            if count:
                moved = True
                self._advance(outgoing, peer, count)
                self._ring(peer)
        for peer, data in list(incoming.items()):
            count = self._in[peer].pull(data)
            if count:
                moved = True
                self._advance(incoming, peer, count)
                # Only who has more of this message to send can be waiting for the room.
                if peer in incoming:
                    self._ring(peer)
        return moved

    @staticmethod
    def _advance(parts: dict[int, Bytes], peer: int, count: int) -> None:
        rest = parts[peer][count:]
        if len(rest):
            parts[peer] = rest
        else:
            del parts[peer]

    def _ring(self, peer: int) -> None:
        bell = self._bells[peer]
        bell[self.rank] = (int(bell[self.rank]) + 1) & 0xFF
        self._futex.wake(int(bell.ctypes.data) + self.rank // _WORD * _WORD)

    def _wait(self, seen: npt.NDArray[np.uint32], peers: set[int]) -> None:
        """Sleep until one of `peers` rings after `seen` was read, or for a moment; then it is worth
        looking again."""
        began = time.monotonic()
        words = sorted({peer // _WORD for peer in peers})
        while time.monotonic() - began < self._spin_s:
            if any(self._words[word] != seen[word] for word in words):
                break
        else:
            # One futex is one word, four peers; with more the others are looked at in turn.
            nap = min(1.0 if len(words) == 1 else 1e-3, self.timeout_s)
            address = int(self._words.ctypes.data) + words[0] * _WORD
            self._futex.wait(address, int(seen[words[0]]), nap)
        self.traffic.exposed_s += time.monotonic() - began

"""Messages between ranks of one host through boxes that the receiver can read: memory of a GPU that
is mapped into several processes, or of the host.

A sender has two boxes for each peer. It copies a piece of a message into one, marks the moment on
its stream, and counts the piece as posted; the receiver sees the count, lets its stream wait for
that moment, copies the piece out, marks that moment and counts the piece as taken. So the host
waits for what a peer has *launched*, never for what a device has done, and a device waits for
another rank's stream by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from mmap import mmap
from typing import Protocol

import numpy as np
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Pending, Traffic
from sps_runtime.distributed.exchange import CarrierCommunicator
from sps_runtime.distributed.futex import Futex
from sps_runtime.distributed.regions import LINE

BOXES = 2
"""Of a pair of ranks and direction: one is filled while the other is emptied."""


class Moments(Protocol):
    """Marks on streams that other ranks' streams can wait for. A mark is made again only after its
    last one was waited for."""

    def filled(self, peer: int, box: int) -> None:
        """This rank's stream has put a piece into its box for `peer`."""
        ...

    def emptied(self, peer: int, box: int) -> None:
        """This rank's stream has taken a piece out of `peer`'s box for it."""
        ...

    def await_filled(self, peer: int, box: int) -> None:
        """Let this rank's stream wait until `peer` has filled its box for this rank."""
        ...

    def await_emptied(self, peer: int, box: int) -> None:
        """Let this rank's stream wait until `peer` has emptied this rank's box for it."""
        ...


class Side(Protocol):
    """A stream beside the one that computes."""

    def behind(self) -> AbstractContextManager[object]:
        """What is launched inside runs on it, after all that was launched before."""
        ...

    def join(self) -> None:
        """Let what is launched from now on run after all that was launched on it."""
        ...


@dataclass(frozen=True)
class Boxes:
    """One rank's view of all boxes.

    Attributes:
        mine: uint8 ``[world, BOXES, box_bytes]``: what this rank sends, by receiver.
        theirs: of each other rank its `mine`; None of this rank itself.
    """

    mine: Tensor
    theirs: Sequence[Tensor | None]

    @property
    def box_bytes(self) -> int:
        return int(self.mine.shape[2])


def counter_bytes(world_size: int) -> int:
    """Bytes of the counters of all pairs: posted, then taken, a cache line each."""
    return 2 * world_size * world_size * LINE


class BoxMailroom:
    """One rank's `Mailroom` and `Carrier`: its ends of all boxes.

    Args:
        boxes: as this rank can read and write them.
        moments: of the same boxes.
        side: where exchanges that are begun run.
        memory: `counter_bytes` of host memory that all ranks share, zero at first.
        timeout_s: how long a peer may take.
    """

    recordable = False  # the host counts pieces

    def __init__(
        self,
        boxes: Boxes,
        moments: Moments,
        side: Side,
        memory: mmap,
        rank: int,
        world_size: int,
        traffic: Traffic,
        *,
        timeout_s: float = 60.0,
        spin_s: float = 0.0,
    ) -> None:
        self.rank, self.traffic, self._side = rank, traffic, side
        self._boxes, self._moments = boxes, moments
        words = np.frombuffer(memory, dtype=np.int64, count=counter_bytes(world_size) // 8)
        self._base = int(words.ctypes.data)
        self._counts = words[:: LINE // 8].reshape(2, world_size, world_size)
        self._timeout_s, self._spin_s = timeout_s, spin_s
        self._futex = Futex()
        self._communicator = cache(partial(CarrierCommunicator, self))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)

    def move(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        """Launch all copies, in the order of the current stream: the host does not wait for them.
        Every rank sends its n-th piece before it takes others' n-th, so that nobody waits for who
        waits for it.

        Raises:
            ConnectionError: a peer did not launch its part in time.
        """
        size = self._boxes.box_bytes
        longest = max(t.numel() for t in (*outgoing.values(), *incoming.values()))
        for begin in range(0, longest, size):
            for peer, data in outgoing.items():
                if begin < data.numel():
                    self._put(peer, data[begin : begin + size])
            for peer, data in incoming.items():
                if begin < data.numel():
                    self._take(peer, data[begin : begin + size])

    def start(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int) -> Pending:
        with self._side.behind():
            self.move(outgoing, incoming)
        return _OnSide(self._side, (outgoing, incoming))

    def _put(self, peer: int, piece: Tensor) -> None:
        number = int(self._counts[0, self.rank, peer])
        box = number % BOXES
        if number >= BOXES:
            self._await(1, self.rank, peer, number - BOXES + 1)
            self._moments.await_emptied(peer, box)
        self._boxes.mine[peer, box, : piece.numel()].copy_(piece)
        self._moments.filled(peer, box)
        self._count(0, self.rank, peer)

    def _take(self, peer: int, piece: Tensor) -> None:
        number = int(self._counts[1, peer, self.rank])
        box = number % BOXES
        self._await(0, peer, self.rank, number + 1)
        self._moments.await_filled(peer, box)
        theirs = self._boxes.theirs[peer]
        assert theirs is not None, "a rank sends nothing to itself"
        piece.copy_(theirs[self.rank, box, : piece.numel()])
        self._moments.emptied(peer, box)
        self._count(1, peer, self.rank)

    def _count(self, kind: int, sender: int, receiver: int) -> None:
        self._counts[kind, sender, receiver] += 1
        self._futex.wake(self._address(kind, sender, receiver))

    def _await(self, kind: int, sender: int, receiver: int, target: int) -> None:
        """Sleep until a count is at least `target`."""
        began = time.monotonic()
        while (seen := int(self._counts[kind, sender, receiver])) < target:
            waited = time.monotonic() - began
            if waited > self._timeout_s:
                peer = receiver if sender == self.rank else sender
                raise ConnectionError(f"rank {peer} did not answer rank {self.rank} in time")
            if waited > self._spin_s:
                self._futex.wait(self._address(kind, sender, receiver), seen & 0xFFFFFFFF, 0.05)
        self.traffic.exposed_s += time.monotonic() - began

    def _address(self, kind: int, sender: int, receiver: int) -> int:
        world = self._counts.shape[1]
        return self._base + ((kind * world + sender) * world + receiver) * LINE


@dataclass(frozen=True)
class _OnSide:
    """A `Pending` exchange on a side stream.

    Attributes:
        tensors: held on to until the stream that computes waits for it: their memory is that
            stream's.
    """

    side: Side
    tensors: object

    def wait(self) -> float:
        self.side.join()
        return 0.0

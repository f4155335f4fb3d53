"""Ranks as threads of one process: the full matrix of exactness runs on these."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Kind, Pending, Traffic
from sps_runtime.distributed.exchange import TorchSum, check, copy_own, count_sent

T = TypeVar("T")
_POLL_S = 0.05


class ThreadWorld:
    """A queue for each directed pair of global ranks and each tag.

    Args:
        world_size: ranks.
        timeout_s: how long a peer may take.
    """

    def __init__(self, world_size: int, *, timeout_s: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.failed = threading.Event()
        self._lock = threading.Lock()
        self._queues: dict[tuple[int, int, int], SimpleQueue[Tensor]] = defaultdict(SimpleQueue)

    def mailroom(self, rank: int, traffic: Traffic | None = None) -> ThreadMailroom:
        """What global rank `rank` uses."""
        return ThreadMailroom(self, rank, traffic or Traffic())

    def queue(self, source: int, target: int, tag: int) -> SimpleQueue[Tensor]:
        """Messages of a pair of ranks under a tag, in their order."""
        with self._lock:
            return self._queues[source, target, tag]

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Call `work(rank)` on a thread per rank and return the results by rank. The first error
        wakes everyone who waits and is raised here."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def call(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.failed.set()

        threads = [
            threading.Thread(target=call, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.world_size)]


class ThreadMailroom:
    """One thread rank's `Mailroom`."""

    def __init__(self, world: ThreadWorld, rank: int, traffic: Traffic) -> None:
        self.traffic = traffic
        self._communicator = cache(partial(ThreadCommunicator, world, rank, traffic=traffic))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)


class ThreadCommunicator(TorchSum):
    """One thread rank's `Communicator` of a group."""

    def __init__(
        self, world: ThreadWorld, global_rank: int, global_ranks: tuple[int, ...], traffic: Traffic
    ) -> None:
        self._world = world
        self._members = global_ranks
        self._global_rank = global_rank
        self.rank = global_ranks.index(global_rank)
        self.size = len(global_ranks)
        self.traffic = traffic

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        self.traffic.exposed_s += self.start(send, recv, kind).wait()

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        check(send, recv, self.size)
        for member, tensor in enumerate(send):
            if member != self.rank and tensor.numel():
                target = self._members[member]
                self._world.queue(self._global_rank, target, tag).put(tensor.clone())
        copy_own(send, recv, self.rank)
        count_sent(self.traffic, send, self.rank, kind)
        return _Receiving(self, recv, tag)

    def receive(self, recv: Sequence[Tensor], tag: int) -> float:
        """Fill `recv` with what the members gave; the seconds waited."""
        began = time.monotonic()
        for member, tensor in enumerate(recv):
            if member != self.rank and tensor.numel():
                tensor.copy_(self._receive(self._members[member], tensor, tag))
        return time.monotonic() - began

    def _receive(self, source: int, wanted: Tensor, tag: int) -> Tensor:
        queue = self._world.queue(source, self._global_rank, tag)
        began = time.monotonic()
        while True:
            try:
                got = queue.get(timeout=_POLL_S)
                break
            except Empty:
                late = time.monotonic() - began > self._world.timeout_s
                if late or self._world.failed.is_set():
                    raise ConnectionError(f"rank {source} did not send") from None
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ConnectionError(
                f"rank {source} sent {tuple(got.shape)} {got.dtype}, "
                f"not {tuple(wanted.shape)} {wanted.dtype}: ranks have diverged"
            )
        return got


@dataclass(frozen=True)
class _Receiving:
    """A `Pending` exchange: everything is sent."""

    communicator: ThreadCommunicator
    recv: Sequence[Tensor]
    tag: int

    def wait(self) -> float:
        return self.communicator.receive(self.recv, self.tag)

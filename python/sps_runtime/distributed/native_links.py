"""Messages between processes of one host by `sps_kernel.Links`: the rings of
`distributed.shared_memory`, in C++, so that an exchange costs microseconds and can be recorded
(`ops.recording`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from mmap import mmap
from types import ModuleType

from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Kind, Pending, Traffic
from sps_runtime.distributed.exchange import Done, check, count_sent
from sps_runtime.distributed.shared_memory import RING_BYTES


class NativeMailroom:
    """One rank's ends of the rings.

    Args:
        kernels: the package (`ops.dispatch`).
        memory: ``regions.link_bytes(world_size, ring_bytes)`` bytes, shared by all ranks, zero at
            first. All ranks of a region use this class, or none.
        rank: this global rank.
        traffic: where to count.
        timeout_s: how long nothing may move.
        spin_s: how long a wait looks before it sleeps; 0 where ranks outnumber cores.
    """

    def __init__(
        self,
        kernels: ModuleType,
        memory: mmap,
        rank: int,
        world_size: int,
        traffic: Traffic,
        *,
        ring_bytes: int = RING_BYTES,
        timeout_s: float = 60.0,
        spin_s: float = 0.0,
    ) -> None:
        self.rank = rank
        self.traffic = traffic
        self.kernels = kernels
        self.links = kernels.Links(
            memory,
            rank,
            world_size,
            ring_bytes=ring_bytes,
            timeout_s=timeout_s,
            spin_us=1e6 * spin_s,
        )
        traffic.meters.append(self.links.take_waited)
        self._communicator = cache(partial(NativeCommunicator, self))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)


class NativeCommunicator:
    """One process rank's `Communicator` of a group on its host."""

    recordable = True

    def __init__(self, mailroom: NativeMailroom, global_ranks: tuple[int, ...]) -> None:
        self._mailroom = mailroom
        self._members = global_ranks
        self.rank = global_ranks.index(mailroom.rank)
        self.size = len(global_ranks)
        self.traffic = mailroom.traffic

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        check(send, recv, self.size)
        count_sent(self.traffic, send, self.rank, kind)
        self._mailroom.links.exchange(self._members, send, recv)

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        self.exchange(send, recv, kind)
        return Done()

    def sum(self, parts: Tensor) -> Tensor:
        out = parts.new_empty(parts.shape[1:])
        self._mailroom.kernels.sum_parts(parts, out=out)
        return out

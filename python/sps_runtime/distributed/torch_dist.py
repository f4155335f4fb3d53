"""Messages between hosts through torch.distributed's process groups: gloo, and NCCL.

A process group is made directly from a store and held as an object: torch's global default group is
not touched. Messages are point to point, so groups need no collective set-up. torch's object
collectives, which unpickle what they receive, are never used.

The NCCL path follows torch's own batched point-to-point calls; it has not run on two GPUs yet.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch.distributed
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Pending, Traffic
from sps_runtime.distributed.exchange import CarrierCommunicator

# torch's stubs leave out half of what is used here, and name groups by classes that they hide.
dist: Any = torch.distributed
Store = Any
ProcessGroup = Any


SMALL = 4096
"""Bytes of a message that goes ahead of large ones."""


def file_store(path: str, world_size: int) -> Store:
    """Rendezvous through a file in a private directory: ranks of one host."""
    return dist.FileStore(path, world_size)


def tcp_store(
    host: str, port: int, world_size: int, *, master: bool, timeout_s: float = 60.0
) -> Store:
    """Rendezvous of several hosts at ``host:port``, served by the one `master` among the ranks.

    The master listens on exactly that address: torch's own listener would take every interface.
    """
    timeout = timedelta(seconds=timeout_s)
    if not master:
        return dist.TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=world_size + 8)
    return dist.TCPStore(
        host,
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def gloo_group(
    store: Store, rank: int, world_size: int, *, address: str, timeout_s: float = 60.0
) -> ProcessGroup:
    """A gloo group whose ranks listen at `address` (an IP or name of this host) only.

    Raises:
        ConnectionError: when not all ranks come in time.
    """
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        return dist.ProcessGroupGloo(store, rank, world_size, options)
    except RuntimeError as error:
        raise ConnectionError(f"rank {rank} could not connect: {error}") from error


def gloo_mailroom(
    store: Store,
    rank: int,
    world_size: int,
    traffic: Traffic,
    *,
    address: str,
    timeout_s: float = 60.0,
) -> TorchDistMailroom:
    """A mailroom over two gloo groups, each with connections of its own.

    Raises:
        ConnectionError: when not all ranks come in time.
    """
    group, back = (
        gloo_group(
            dist.PrefixStore(way, store), rank, world_size, address=address, timeout_s=timeout_s
        )
        for way in ("up", "down")
    )
    return TorchDistMailroom(group, traffic, back=back)


def nccl_group(
    store: Store, rank: int, world_size: int, *, timeout_s: float = 60.0
) -> ProcessGroup:
    """An NCCL group; tensors lie on this rank's current CUDA device. Not run yet."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


class TorchDistMailroom:
    """One rank's `Mailroom` and `Carrier` over a process group of the whole world.

    gloo asks for each message by one of its own on the same connection, and a connection's bytes
    keep their order: behind megabytes that leave, a request for others would wait for all of them.
    So with `back` large messages to higher ranks take `group`, those to lower ones `back`, and
    small ones, which others may be waiting for, go against the stream.

    Args:
        group: of `gloo_group` or `nccl_group`.
        traffic: where to count.
        back: a second group of the same ranks.
        coalesce: post all messages of an exchange as one operation, as NCCL needs; what NCCL does
            is on streams alone, and CUDA graphs hold it.
    """

    def __init__(
        self,
        group: ProcessGroup,
        traffic: Traffic,
        *,
        back: ProcessGroup | None = None,
        coalesce: bool = False,
    ) -> None:
        self._group, self._back = group, back or group
        self._coalesce = self.recordable = coalesce
        self.rank = int(group.rank())
        self.traffic = traffic
        self._communicator = cache(partial(CarrierCommunicator, self))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)

    def move(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        self.traffic.exposed_s += self.start(outgoing, incoming, tag=0).wait()

    def start(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int) -> Pending:
        """gloo moves messages in a thread of its own, NCCL on a stream of its own."""
        try:
            works = self._post(outgoing, incoming, tag)
        except RuntimeError as error:
            raise lost_peer(self.rank, error) from error
        return _Posted(self.rank, works, (outgoing, incoming))

    def _post(
        self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int
    ) -> list[Any]:
        group, way = self._group, self._way
        device = next(iter((*outgoing.values(), *incoming.values()))).device
        if self._coalesce:
            group._start_coalescing(device)
        # gloo asks for a message by one of its own, on the same connection. Posted after what is
        # sent, it would arrive after it, and a wire would carry one way at a time.
        works = [
            way(self.rank > peer, data).recv([data], peer, tag) for peer, data in incoming.items()
        ]
        works += [
            way(self.rank < peer, data).send([data], peer, tag) for peer, data in outgoing.items()
        ]
        return [group._end_coalescing(device)] if self._coalesce else works

    def _way(self, upwards: bool, data: Tensor) -> ProcessGroup:
        """The group that takes a message to a higher rank, or to a lower one."""
        return self._group if upwards == (data.nbytes > SMALL) else self._back


@dataclass(frozen=True)
class _Posted:
    """A `Pending` exchange.

    Attributes:
        rank: this global rank.
        works: torch's handles.
        tensors: held on to until all is moved.
    """

    rank: int
    works: list[Any]
    tensors: object

    def wait(self) -> float:
        began = time.monotonic()
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise lost_peer(self.rank, error) from error
        return time.monotonic() - began


def lost_peer(rank: int, error: RuntimeError) -> ConnectionError:
    """What a failed message means."""
    return ConnectionError(f"rank {rank} lost a peer: {error}")

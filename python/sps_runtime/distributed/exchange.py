"""What every implementation of `Communicator.exchange` does the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sps_runtime.distributed.communicator import Kind, Pending, Traffic


class Done:
    """A `Pending` exchange with nothing left to wait for."""

    def wait(self) -> float:
        return 0.0


class TorchSum:
    """What communicators have in common whose sums torch computes.

    Attributes:
        recordable: only where a device carries messages by itself.
    """

    recordable: bool = False

    def sum(self, parts: Tensor) -> Tensor:
        total = parts[0].to(torch.float32, copy=True)
        for part in parts[1:]:  # torch.sum's order would depend on shapes
            total += part
        return total.to(parts.dtype)


def check(send: Sequence[Tensor], recv: Sequence[Tensor], size: int) -> None:
    """Raise ValueError for a call that no transport could carry out."""
    if len(send) != size or len(recv) != size:
        raise ValueError(f"{len(send)} and {len(recv)} tensors for {size} members")
    if not all(tensor.is_contiguous() for tensor in (*send, *recv)):
        raise ValueError("tensors of an exchange are contiguous")


def copy_own(send: Sequence[Tensor], recv: Sequence[Tensor], rank: int) -> None:
    """A member's message to itself."""
    if send[rank].data_ptr() != recv[rank].data_ptr():
        recv[rank].copy_(send[rank])


def count_sent(traffic: Traffic, send: Sequence[Tensor], rank: int, kind: Kind) -> None:
    """Add what goes to others; all of it is copied, so logical and physical bytes agree."""
    sent = sum(
        tensor.numel() * tensor.element_size()
        for member, tensor in enumerate(send)
        if member != rank
    )
    traffic.physical_bytes += sent
    if kind == "attention":
        traffic.attention_bytes += sent
    elif kind == "linear":
        traffic.linear_bytes += sent


class Carrier(Protocol):
    """A transport of flat byte tensors between global ranks.

    Attributes:
        rank: this global rank.
        traffic: where to count.
        recordable: whether messages are work of a device alone, which a graph holds.
    """

    rank: int
    traffic: Traffic
    recordable: bool

    def move(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        """Send and fill everything, by global rank, and count what waiting for it took.

        Raises:
            ConnectionError: when a peer is gone or does not answer in time.
        """
        ...

    def start(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], tag: int) -> Pending:
        """Begin to `move` them; messages of a pair of ranks keep their order within a tag."""
        ...


class CarrierCommunicator(TorchSum):
    """One rank's `Communicator` of a group, over a transport that need not know of groups.

    Args:
        carrier: of this rank.
        global_ranks: the group's, this rank's among them.
    """

    def __init__(self, carrier: Carrier, global_ranks: tuple[int, ...]) -> None:
        self._carrier = carrier
        self._members = global_ranks
        self.rank = global_ranks.index(carrier.rank)
        self.size = len(global_ranks)
        self.traffic = carrier.traffic
        self.recordable = carrier.recordable

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        outgoing, incoming = self._messages(send, recv, kind)
        if outgoing or incoming:
            self._carrier.move(outgoing, incoming)

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        outgoing, incoming = self._messages(send, recv, kind)
        return self._carrier.start(outgoing, incoming, tag) if outgoing or incoming else Done()

    def _messages(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What goes to others and comes from them; what stays here is copied."""
        check(send, recv, self.size)
        copy_own(send, recv, self.rank)
        count_sent(self.traffic, send, self.rank, kind)
        return self._by_rank(send), self._by_rank(recv)

    def _by_rank(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        return {
            self._members[member]: as_bytes(tensor)
            for member, tensor in enumerate(tensors)
            if member != self.rank and tensor.numel()
        }


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat uint8."""
    return tensor.reshape(-1).view(torch.uint8)

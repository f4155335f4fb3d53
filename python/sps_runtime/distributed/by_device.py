"""Ranks on GPUs: what lies there crosses by what GPUs have, what lies on the host as between CPU
ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Kind, Mailroom, Pending, Traffic
from sps_runtime.distributed.exchange import TorchSum


class DeviceMailroom:
    """Makes communicators that look at where tensors lie.

    Args:
        host: for tensors of the host; counts in `traffic`.
        device: for tensors on a device; counts in the same.
    """

    def __init__(self, host: Mailroom, device: Mailroom) -> None:
        self._communicator = cache(lambda ranks: ByDevice(host.group(ranks), device.group(ranks)))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)


class ByDevice(TorchSum):
    """One rank's `Communicator` of a group."""

    def __init__(self, host: Communicator, device: Communicator) -> None:
        self._host, self._device = host, device
        self.rank, self.size = host.rank, host.size
        self.traffic: Traffic = host.traffic
        self.recordable = device.recordable  # recordings are of tensors on the device

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        self._of(send, recv).exchange(send, recv, kind)

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        return self._of(send, recv).start(send, recv, kind, tag)

    def _of(self, send: Sequence[Tensor], recv: Sequence[Tensor]) -> Communicator:
        kinds = {tensor.device.type for tensor in (*send, *recv)}
        if len(kinds) > 1:
            raise ValueError(f"an exchange of tensors on {sorted(kinds)}")
        return self._host if kinds <= {"cpu"} else self._device


class StagedMailroom:
    """Carries tensors of a device through pinned memory of the host and a host's links: what is
    left where GPUs cannot reach one another.

    Args:
        host: between the same ranks (shared memory, gloo).
    """

    def __init__(self, host: Mailroom) -> None:
        self._communicator = cache(lambda ranks: Staged(host.group(ranks)))

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return self._communicator(global_ranks)


class Staged(TorchSum):
    """One rank's `Communicator` of a group."""

    def __init__(self, host: Communicator) -> None:
        self._host = host
        self.rank, self.size = host.rank, host.size
        self.traffic: Traffic = host.traffic

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        self.traffic.exposed_s += self.start(send, recv, kind).wait()

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        """Copies to the host are waited for here, by their stream; those back are left to it."""
        if send[self.rank].data_ptr() != recv[self.rank].data_ptr():
            recv[self.rank].copy_(send[self.rank])
        device = next((t.device for t in (*send, *recv)), torch.device("cpu"))
        staged_send, staged_recv = self._room(send, device), self._room(recv, device)
        for member, (to, tensor) in enumerate(zip(staged_send, send, strict=True)):
            if member != self.rank:
                to.copy_(tensor, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        pending = self._host.start(staged_send, staged_recv, kind, tag)
        return _Unstaging(pending, staged_recv, recv, self.rank)

    def _room(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Pinned memory for all tensors but this rank's own, which stays where it is."""
        shapes = [(0,) if i == self.rank else tuple(t.shape) for i, t in enumerate(tensors)]
        return [
            torch.empty(shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
            for shape, tensor in zip(shapes, tensors, strict=True)
        ]


@dataclass(frozen=True)
class _Unstaging:
    """A `Pending` exchange whose messages arrive in pinned memory."""

    pending: Pending
    staged: Sequence[Tensor]
    recv: Sequence[Tensor]
    rank: int

    def wait(self) -> float:
        waited = self.pending.wait()
        for member, (tensor, staged) in enumerate(zip(self.recv, self.staged, strict=True)):
            if member != self.rank:
                tensor.copy_(staged, non_blocking=True)
        return waited

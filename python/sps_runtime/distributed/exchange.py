"""What every implementation of `Communicator.exchange` does the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.distributed.communicator import Kind, Traffic


class Done:
    """A `Pending` exchange with nothing left to wait for."""

    def wait(self) -> float:
        return 0.0


class TorchSum:
    """What communicators have in common that are not recordable."""

    recordable = False

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


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat uint8."""
    return tensor.reshape(-1).view(torch.uint8)

"""Collectives of a group, built on `Communicator.exchange` alone.

Sums are taken in fp32 and in the order of ranks, so every member that computes a sum of the same
parts has the same bits, and the parts' order of arrival changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.distributed.communicator import Communicator, Kind


def all_to_all(
    communicator: Communicator,
    send: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    kind: Kind,
) -> list[Tensor]:
    """Give `send[i]` to member i; return what each member gave, `shapes[i]` from member i, in
    `send`'s dtype. What a member gives itself is returned as it is, not copied."""
    rank = communicator.rank
    recv = [
        send[rank] if member == rank else send[rank].new_empty(tuple(shape))
        for member, shape in enumerate(shapes)
    ]
    communicator.exchange(send, recv, kind)
    return recv


def all_gather(communicator: Communicator, x: Tensor, rows: Sequence[int], kind: Kind) -> Tensor:
    """Members' rows laid end to end in rank order.

    Args:
        x: ``[rows[rank], ...]`` contiguous, this member's.
        rows: rows of each member; may differ and be 0.
    """
    out = x.new_empty((sum(rows), *x.shape[1:]))
    recv = list(torch.split(out, list(rows)))
    communicator.exchange([x] * communicator.size, recv, kind)
    return out


def reduce_scatter(
    communicator: Communicator, x: Tensor, rows: Sequence[int], kind: Kind
) -> Tensor:
    """The sum over members of x, of which this member gets its rows.

    Args:
        x: ``[sum(rows), ...]`` contiguous, this member's part of the sum.
        rows: rows that each member gets, in rank order.

    Returns:
        ``[rows[rank], ...]`` in x's dtype.
    """
    send = list(torch.split(x, list(rows)))
    mine = send[communicator.rank]
    parts = mine.new_empty((communicator.size, *mine.shape))
    communicator.exchange(send, list(parts.unbind(0)), kind)
    return communicator.sum(parts)


def all_reduce(communicator: Communicator, x: Tensor, kind: Kind) -> Tensor:
    """The sum over members of x ``[rows, ...]``, on every member, with the same bits.

    Reduce-scatter and all-gather over rows once there are several rows a member: 2 (n-1)/n of the
    bytes of x sent by each instead of n-1 times.
    """
    size = communicator.size
    if size == 1:
        return x
    if size == 2 or x.shape[0] < size:
        parts = x.new_empty((size, *x.shape))
        communicator.exchange([x] * size, list(parts.unbind(0)), kind)
        return communicator.sum(parts)
    base, more = divmod(x.shape[0], size)
    rows = [base + (member < more) for member in range(size)]
    return all_gather(communicator, reduce_scatter(communicator, x, rows, kind), rows, kind)

"""Queries to every member of a group, and their partials back to where outputs are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.page_reads import RowSet
from sps_runtime.attention.sequence_parallel.exact.partials import (
    merge_home,
    pack,
    packed_bytes,
    unpack,
)
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.distributed.mesh import shares


def gather_queries(step: StepState, q_THD: Tensor) -> Tensor:
    """The queries of all the step's tokens, in the order of the plan."""
    layout = step.layout
    if step.size == 1 or layout.placement == "replicated":
        return q_THD
    mine = q_THD.contiguous()
    found = [mine.new_empty((rows, *mine.shape[1:])) for rows in layout.rows]
    step.communicate([mine] * step.size, found)
    whole = mine.new_empty((sum(layout.rows), *mine.shape[1:]))
    for member, rows in enumerate(found):
        whole[torch.from_numpy(layout.token_index(member))] = rows
    return whole


def bring_home(step: StepState, partial: Partial, q_THD: Tensor) -> Tensor:
    """Merge every member's partial of all tokens: this rank's tokens where they lie sharded, its
    share of heads (the others are zero) where they are replicated.

    Args:
        q_THD: this rank's queries.
    """
    if step.size == 1:
        return partial.o.to(q_THD.dtype)
    if step.layout.placement == "replicated":
        return _share_heads(step, partial, q_THD)
    index = [torch.from_numpy(step.layout.token_index(m)) for m in range(step.size)]
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    parts = [Partial(partial.o[at], partial.lse[at]) for at in index]
    _swap(step, parts, out)
    return out


def _share_heads(step: StepState, partial: Partial, q_THD: Tensor) -> Tensor:
    heads = shares(q_THD.shape[1], step.size)
    begin, end = heads[step.me]
    out = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    parts = [Partial(partial.o[:, a:b], partial.lse[:, a:b]) for a, b in heads]
    _swap(step, parts, out[:, begin:end])
    return out


def _swap(step: StepState, parts: list[Partial], out_THD: Tensor) -> None:
    """Give each member its part, and merge what came with this rank's own into `out_THD`."""
    rows, heads, dim = out_THD.shape
    dtype, nothing = out_THD.dtype, out_THD.new_empty(0, dtype=torch.uint8)
    send = [
        nothing if m == step.me else pack(part.o, part.lse, dtype) for m, part in enumerate(parts)
    ]
    size = packed_bytes(rows, heads, dim, dtype)
    recv = [nothing.new_empty(0 if m == step.me else size) for m in range(step.size)]
    step.communicate(send, recv)
    others = [
        (RowSet(torch.arange(rows).numpy(), rows), unpack(message, rows, heads, dim, dtype))
        for m, message in enumerate(recv)
        if m != step.me
    ]
    if rows and heads:
        own = parts[step.me]
        merge_home(step.context.backend, Partial(own.o, own.lse), others, out_THD)

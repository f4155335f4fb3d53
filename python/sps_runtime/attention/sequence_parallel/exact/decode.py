"""Attention of a step of one new token a sequence, whose shapes do not depend on what is in it.

A group of one reads all pages in place. In a larger group every rank computed every token: each
attends with all queries over its own pages, and partials are exchanged by head share, as in
`replicated`; but partials of all rows travel, also of those that see none of a rank's pages, so
that a recording of the step serves every later one. Bytes sent per query, layer and rank:
``Hq (d b + 4) (P - 1) / P``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.decode_inputs import DecodeInputs
from sps_runtime.attention.row_pages import Int64s, PageReaders
from sps_runtime.attention.sequence_parallel.exact.partials import packed_bytes, unpack
from sps_runtime.distributed.communicator import Communicator
from sps_runtime.distributed.mesh import shares
from sps_runtime.types.attention import AttentionSpec
from sps_runtime.types.plan import StepPlan


def decodes_sparse(attention: AttentionSpec) -> bool:
    """Whether a generated token reads chosen pages only."""
    return attention.sparse is not None and attention.sparse.decode == "sparse"


def is_decode(plan: StepPlan) -> bool:
    """Whether a plan's step may run with `DecodeAttention`: one new token of each sequence, all of
    them sampled, on one rank or replicated, and every page read."""
    one_place = len(plan.group) == 1 or plan.placement == "replicated"
    return one_place and all(
        sequence.count == 1
        and sequence.sample is not None
        and sequence.prompt_logprobs_from < 0
        and not decodes_sparse(sequence.attention)
        for sequence in plan.sequences
    )


def page_count(plan: StepPlan, page_size: int, steps: int = 1) -> int:
    """Pages of all sequences of the last of some decode steps, the first of which is a plan's."""
    return sum((sequence.start + steps - 1) // page_size + 1 for sequence in plan.sequences)


def reachable(plan: StepPlan, context: AttentionContext) -> bool:
    """Whether every page lies with a member of the group, or can be read here in place."""
    readable, shape = context.store.readable, context.store.shape
    if all(readable):
        return True
    members = plan.group if len(plan.group) > 1 else ()
    reached = np.array([ok or rank in members for rank, ok in enumerate(readable)])
    packed = b"".join(
        sequence.pages[: 4 * (sequence.start // shape.page_size + 1)] for sequence in plan.sequences
    )
    return bool(reached[np.frombuffer(packed, np.int32) // shape.slots].all())


def decode_inputs(
    plan: StepPlan, context: AttentionContext, capacity: int, rows: int
) -> DecodeInputs:
    """Arrays for a step's shape of so many rows; `fill` comes next.

    Pages outside of the group are dealt to members by SP rank.
    """
    group, mesh, shape = plan.group, context.mesh, context.store.shape
    readers = PageReaders(
        page_size=shape.page_size,
        pages_per_rank=shape.slots,
        sp_rank=mesh.sp_rank,
        member=group.index(mesh.sp_rank),
        readers=tuple(
            group.index(sp_rank) if sp_rank in group else sp_rank % len(group)
            for sp_rank in range(mesh.sp_size)
        ),
    )
    return DecodeInputs(rows, capacity, shape.kv_heads, readers, context.device)


class DecodeAttention:
    """`layers.step.SequenceAttention` over the arrays of `DecodeInputs`.

    Args:
        sp: the group's SP peers.

    Attributes:
        layers: how often each window was asked for in one step.
    """

    def __init__(self, inputs: DecodeInputs, context: AttentionContext, sp: Communicator) -> None:
        self._inputs, self._context, self._sp = inputs, context, sp
        self.layers: dict[int | None, int] = {}

    def refresh(self) -> bool:
        """The arrays hold another step's values. False: no recording can be replayed with them."""
        backend = self._context.backend
        refreshed = [backend.refresh(lists) for lists in self._inputs.standing()]
        self._inputs.sent()
        return all(refreshed)

    def form(self) -> tuple[str | None, ...]:
        """Of all page lists that were asked for so far, what `AttentionBackend.form` says."""
        return tuple(self._context.backend.form(lists) for lists in self._inputs.standing())

    def begin(self) -> None:
        """Before each run of the layers' code."""
        self.layers.clear()

    def remote_bytes(self) -> int:
        """Logical bytes that the step's layers read in place from other ranks' pools."""
        tokens = sum(
            count * self._inputs.remote_tokens(window) for window, count in self.layers.items()
        )
        return tokens * self._context.store.shape.token_bytes

    def remote_bytes_each(self, remote_S: Mapping[int | None, Int64s]) -> Int64s:
        """As `remote_bytes`, of each of some steps (`decode_inputs.StepFeeds`)."""
        tokens_S = sum(count * remote_S[window] for window, count in self.layers.items())
        return np.asarray(tokens_S * self._context.store.shape.token_bytes)

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        context, inputs = self._context, self._inputs
        self.layers[window] = self.layers.get(window, 0) + 1
        k_pool, v_pool = context.store.own.k[layer], context.store.own.v[layer]
        context.ops.write_kv(k_TKD, v_TKD, k_pool, v_pool, inputs.slots_T, inputs.offsets_T)
        partial = context.backend.partial_lists(
            q_THD, inputs.lists(window), context.pages(layer), scale=scale, window=window
        )
        out_THD = q_THD.new_empty(q_THD.shape)
        if self._sp.size == 1:
            return context.ops.moves.copy_(out_THD, partial.o)
        self._share_heads(partial, out_THD)
        return out_THD

    def _share_heads(self, partial: Partial, out_THD: Tensor) -> None:
        """Give every member its heads of this rank's partial; merge those of this rank's heads."""
        sp, dtype = self._sp, out_THD.dtype
        rows, all_heads, dim = out_THD.shape
        heads = shares(all_heads, sp.size)
        begin, end = heads[sp.rank]
        mine = Partial(partial.o[:, begin:end], partial.lse[:, begin:end])
        nothing = partial.o.new_empty(0)
        send, recv, others = [], [], []
        for member, (first, last) in enumerate(heads):
            if member == sp.rank:
                send.append(nothing)
                recv.append(nothing)
                continue
            theirs = Partial(partial.o[:, first:last], partial.lse[:, first:last])
            send.append(self._pack(theirs, out_THD))
            message = self._message(rows, end - begin, out_THD)
            recv.append(message)
            others.append(unpack(message, rows, end - begin, dim, dtype))
        sp.exchange(send, recv, "attention")
        if begin < end:
            parts = [*others[: sp.rank], mine, *others[sp.rank :]]
            self._context.backend.merge(parts, out_THD[:, begin:end])

    def _pack(self, partial: Partial, like: Tensor) -> Tensor:
        """A partial in one message: lse in fp32, o rounded to `like`'s dtype."""
        rows, heads, dim = partial.o.shape
        message = self._message(rows, heads, like)
        packed = unpack(message, rows, heads, dim, like.dtype)
        moves = self._context.ops.moves
        moves.copy_(packed.o, partial.o)
        moves.copy_(packed.lse, partial.lse)
        return message

    @staticmethod
    def _message(rows: int, heads: int, like: Tensor) -> Tensor:
        nbytes = packed_bytes(rows, heads, like.shape[2], like.dtype)
        return like.new_empty(nbytes, dtype=torch.uint8)


def capacity_for(pages: int, least: int = 256) -> int:
    """Pages to make room for: some more than now, so that a growing context seldom asks again."""
    return max(least, 1 << (2 * pages - 1).bit_length())

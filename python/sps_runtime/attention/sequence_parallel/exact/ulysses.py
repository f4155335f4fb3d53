"""Ulysses: from "my tokens, all heads" to "all tokens, my heads" and back.

DeepSpeed-Ulysses (Jacobs et al. 2023), over paged KV: queries cross by an all-to-all over heads; K
and V of a rank's heads are read in place, or sent by their owners; outputs cross back complete, so
no lse travels. Bytes per layer and rank for a fresh prompt:
``(L/P)(2 Hq + 2 max(Hkv, P)) d b (P - 1)/P``.

Sequences that lie wholly on one rank are attended to there, with all heads, and send nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.attention.backend import QueryRun
from sps_runtime.attention.page_reads import cut_pieces, query_runs
from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare, KVReads
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Runs
from sps_runtime.distributed.mesh import shares


def head_shares(heads: int, kv_heads: int, parts: int) -> list[HeadShare]:
    """Query heads of each member, as even as they get.

    Where one of `kv_heads` and `parts` divides the other, shares end at KV heads (each KV head goes
    to as few members as can be); else query heads are dealt evenly, and a KV head that two members
    need goes to both: work matters more than these bytes.
    """
    group = heads // kv_heads
    if parts % kv_heads == 0:
        bounds = [
            (kv * group + begin, kv * group + end)
            for kv in range(kv_heads)
            for begin, end in shares(group, parts // kv_heads)
        ]
    else:
        bounds = shares(heads, parts)
    return [HeadShare.of(begin, end, group) for begin, end in bounds]


@dataclass(frozen=True)
class _Reads:
    """Over one window: K and V for the tokens that crossed, and for those that stay."""

    crossing: KVReads
    staying: list[QueryRun]


class Ulysses:
    """`layers.step.SequenceAttention` of one step."""

    def __init__(self, step: StepState) -> None:
        self._step = step
        layout = step.layout
        owners, first = layout.pages.owners, layout.pages.first[:-1]
        self._local: npt.NDArray[np.bool_] = np.minimum.reduceat(
            owners, first
        ) == np.maximum.reduceat(owners, first)
        crossing = [self._crossing(member) for member in range(step.size)]
        self._counts = [int(runs.count.sum()) for runs in crossing]
        self._all = laid_end_to_end(crossing)
        self._staying_runs = self._staying()
        rows = np.flatnonzero(~self._local[layout.sequences(step.me)])
        self._rows = torch.from_numpy(rows)
        self._reads: dict[int | None, _Reads] = {}

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
        step = self._step
        step.write(layer, k_TKD, v_TKD)
        step.publish(layer)
        reads = self._reads.get(window)
        if reads is None:
            reads = self._reads[window] = self._plan(window)
        split = head_shares(q_THD.shape[1], k_TKD.shape[1], step.size)
        crossing = q_THD if not len(self._staying_runs) else q_THD[self._rows]
        q_all = self._to_heads(crossing, split)
        partial = reads.crossing.attend(layer, q_all, split, scale=scale, window=window)
        back = self._to_tokens(partial.o.to(q_THD.dtype), split)
        if not len(self._staying_runs):
            return back
        pool = step.context.pages(layer)
        backend = step.context.backend
        stayed = backend.partial(q_THD, reads.staying, pool, scale=scale, window=window)
        out = stayed.o.to(q_THD.dtype)
        out[self._rows] = back
        return out

    def _to_heads(self, q_THD: Tensor, split: list[HeadShare]) -> Tensor:
        begin, end = split[self._step.me].q
        send = [q_THD[:, share.q[0] : share.q[1]].contiguous() for share in split]
        q_all = q_THD.new_empty(sum(self._counts), end - begin, q_THD.shape[2])
        self._step.communicate(send, list(torch.split(q_all, self._counts)))
        return q_all

    def _to_tokens(self, o_all: Tensor, split: list[HeadShare]) -> Tensor:
        rows, dim = self._counts[self._step.me], o_all.shape[2]
        recv = [o_all.new_empty(rows, share.q[1] - share.q[0], dim) for share in split]
        self._step.communicate(list(torch.split(o_all, self._counts)), recv)
        return torch.cat(recv, dim=1)

    def _crossing(self, member: int) -> Runs:
        runs = self._step.layout.runs(member)
        return runs.take(~self._local[runs.sequence])

    def _staying(self) -> Runs:
        runs = self._step.layout.runs(self._step.me)
        return runs.take(self._local[runs.sequence])

    def _plan(self, window: int | None) -> _Reads:
        step, layout = self._step, self._step.layout
        own = np.flatnonzero(layout.pages.owners == step.context.mesh.sp_rank)
        return _Reads(
            crossing=KVReads(step, [self._all] * step.size, window),
            staying=query_runs(layout, cut_pieces(layout, self._staying_runs, own, window), own),
        )


def laid_end_to_end(parts: list[Runs]) -> Runs:
    """Runs of all members, their rows packed in member order."""
    count = np.concatenate([runs.count for runs in parts])
    return Runs(
        np.concatenate([runs.sequence for runs in parts]),
        np.cumsum(count) - count,
        count,
        np.concatenate([runs.position for runs in parts]),
    )

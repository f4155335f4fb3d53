"""A rank's parts with a span around each call, for its timeline; nothing of this runs without one.

The parts are wrapped from outside, so that none of them knows of timelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.distributed.communicator import Communicator, Kind, Mailroom, Pending
from sps_runtime.ops.elementwise import Rotate
from sps_runtime.ops.operators import Operators
from sps_runtime.telemetry.timeline import Timeline, traced

_OPERATORS = ("linear", "add_rms_norm", "rms_norm", "silu_mul", "write_kv")
_SPARSE = {
    "summarise": "summarise pages",
    "choose": "choose pages",
    "masses": "judge pages",
    "tail": "tail",
}


class _Traced:
    """Passes everything on; the methods that are named become spans.

    Args:
        part: what is wrapped.
        methods: method -> (name of the span, its category).
    """

    def __init__(
        self, part: object, timeline: Timeline, methods: dict[str, tuple[str, str]]
    ) -> None:
        self._part = part
        self._timeline = timeline
        for method, (name, category) in methods.items():
            setattr(self, method, traced(timeline, name, category, getattr(part, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _TracedOperators(_Traced):
    def __init__(self, ops: Operators, timeline: Timeline) -> None:
        super().__init__(ops, timeline, {name: (name, "compute") for name in _OPERATORS})

    def rotation(
        self, positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
    ) -> Rotate:
        ops = cast(Operators, self._part)
        rotate = ops.rotation(positions_T, frequencies_F, scale, dtype)
        return traced(self._timeline, "rope", "compute", rotate)


class _TracedCommunicator(_Traced):
    def __init__(self, communicator: Communicator, timeline: Timeline) -> None:
        super().__init__(communicator, timeline, {})

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        communicator = cast(Communicator, self._part)
        sent = sum(t.nbytes for i, t in enumerate(send) if i != communicator.rank)
        with self._timeline.span(f"exchange {kind}", "communicate", sent_bytes=sent):
            communicator.exchange(send, recv, kind)

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        communicator = cast(Communicator, self._part)
        sent = sum(t.nbytes for i, t in enumerate(send) if i != communicator.rank)
        with self._timeline.span(f"start {kind}", "communicate", sent_bytes=sent):
            pending = communicator.start(send, recv, kind, tag)
        wait = {"wait": (f"exchange {kind}", "communicate")}
        return cast(Pending, _Traced(pending, self._timeline, wait))


class _TracedMailroom:
    def __init__(self, mailroom: Mailroom, timeline: Timeline) -> None:
        self._communicator = cache(
            lambda ranks: _TracedCommunicator(mailroom.group(ranks), timeline)
        )

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        return cast(Communicator, self._communicator(global_ranks))


def trace_operators(ops: Operators, timeline: Timeline) -> Operators:
    """Operators whose calls are spans; the same ones where nobody looks."""
    return cast(Operators, _TracedOperators(ops, timeline)) if timeline.on else ops


def trace_means(means: AttentionContext, timeline: Timeline) -> AttentionContext:
    """Attention, merges, exchanges and waits as spans; the same means where nobody looks."""
    if not timeline.on:
        return means
    backend = {
        "partial": ("attention", "compute"),
        "partial_lists": ("attention", "compute"),
        "merge": ("merge", "compute"),
    }
    sparse = means.sparse
    if sparse is not None:
        spans = {name: (span, "compute") for name, span in _SPARSE.items()}
        sparse = replace(sparse, operators=cast(Any, _Traced(sparse.operators, timeline, spans)))
    return replace(
        means,
        sparse=sparse,
        mailroom=_TracedMailroom(means.mailroom, timeline),
        backend=cast(Any, _Traced(means.backend, timeline, backend)),
        fence=cast(Any, _Traced(means.fence, timeline, {"wait": ("wait for KV", "wait")})),
    )

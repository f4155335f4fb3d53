"""Recorded decode steps, as CUDA graphs are for GPUs.

A decode step of some shape (group, placement, rows) runs through the model's code once while the
kernels' calls are recorded; later steps of that shape write their tokens, positions and page lists
into the arrays that were recorded and replay everything by one native call. On a CPU this takes
the interpreter, and the exchanges that it makes between ranks, out of the step.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.decode_inputs import DecodeInputs, Feed, TokenSource
from sps_runtime.attention.row_pages import Int64s
from sps_runtime.attention.sequence_parallel.exact.decode import (
    DecodeAttention,
    capacity_for,
    decode_inputs,
    is_decode,
    page_count,
    reachable,
)
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.layers.placement import GroupLinks
from sps_runtime.layers.step import StepContext
from sps_runtime.ops.recording import Recording, Replayable, StepRecorder
from sps_runtime.telemetry.timeline import NoTimeline, Timeline
from sps_runtime.types.plan import Placement, StepPlan

logger = logging.getLogger(__name__)

PADDED = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
"""Rows of steps on GPUs: SGLang and vLLM capture about these."""

Compute = Callable[[Tensor, StepContext], Tensor]
"""Ids and context of a decode step -> logits of all rows; the model's ordinary code."""

MakeContext = Callable[[StepPlan, GroupLinks, Tensor, DecodeAttention], StepContext]
"""From a decode step's plan, links, positions and attention to its context."""


@dataclass(frozen=True)
class StepReplays:
    """What the steps of a burst behind its first need to be replayed one after another.

    Attributes:
        tokens_T: int64 ``[rows]`` where a step reads its ids.
        feeds: what else differs from step to step (`decode_inputs.StepFeeds`).
        remote_bytes_S: int64 ``[steps]`` read in place from other ranks' pools.
        attention_bytes, linear_bytes, physical_bytes: what crosses in each step.
    """

    recording: Recording
    tokens_T: Tensor
    feeds: list[Feed]
    remote_bytes_S: Int64s
    attention_bytes: int
    linear_bytes: int
    physical_bytes: int


Key = tuple[tuple[int, ...], Placement, int]


@dataclass
class _Shape:
    """What is kept of one shape of steps.

    Attributes:
        recordings: what to replay, by the form of the step's page lists.
        refused: why there is no recording; empty where none failed.
        attention_bytes, linear_bytes, physical_bytes: what crosses in each step of this shape.
    """

    inputs: DecodeInputs
    attention: DecodeAttention
    context: StepContext
    recordings: dict[tuple[str | None, ...], Replayable] = field(default_factory=dict)
    refused: str = ""
    attention_bytes: int = 0
    linear_bytes: int = 0
    physical_bytes: int = 0


class StepGraphs:
    """One rank's decode steps, by shape.

    Args:
        means: the rank's.
        compute: the model.
        recorder: None computes every step through the model's code.
        timeline: where a replay's calls go as spans.
        max_rows: steps of more rows are left to others.
        limit: shapes that are kept, the least recently used goes first.
    """

    def __init__(
        self,
        means: AttentionContext,
        compute: Compute,
        recorder: StepRecorder | None,
        timeline: Timeline | None = None,
        *,
        max_rows: int = 64,
        limit: int = 64,
    ) -> None:
        self._means = means
        self._compute = compute
        self._recorder = recorder
        self._timeline: Timeline = timeline or NoTimeline()
        self._max_rows = max_rows
        self._limit = limit
        self._shapes: OrderedDict[Key, _Shape] = OrderedDict()

    def takes(self, plan: StepPlan) -> bool:
        """Whether `run` computes this step."""
        return (
            self._means.backend.recordable
            and len(plan.sequences) <= self._max_rows
            and is_decode(plan)
            and reachable(plan, self._means)
        )

    def run(
        self,
        plan: StepPlan,
        tokens: Sequence[int],
        links: GroupLinks,
        context: MakeContext,
        source: TokenSource | None = None,
    ) -> Tensor:
        """Logits of all rows, valid until the next call.

        Args:
            tokens: ids of the rows.
            links: the group's.
            context: makes the context of the step.
            source: where ids are that the host does not know.

        Raises:
            ConnectionError: a peer is gone or late.
            ValueError: the plan contradicts itself.
        """
        shape = self._shape(plan, links, context)
        shape.inputs.fill(plan, tokens, source)
        if not shape.attention.refresh():
            shape.recordings.clear()
        recording = shape.recordings.get(shape.attention.form())
        if recording is not None:
            logits_RV = self._replay(shape, recording)
        else:
            logits_RV = self._run(shape, links)
        self._means.traffic.attention_bytes += shape.attention.remote_bytes()
        rows = len(plan.sequences)
        return logits_RV if rows == shape.inputs.rows else logits_RV[:rows]

    def ahead(self, plan: StepPlan) -> StepReplays | None:
        """The steps of a burst behind its first, which `run` has just computed; None where they
        cannot be replayed as they are, or where a timeline wants to see each.

        Raises:
            ValueError: the plan contradicts itself.
        """
        shape = self._shapes.get((plan.group, plan.placement, len(plan.sequences)))
        if shape is None or self._timeline.on or not self.takes(plan):
            return None
        recording = shape.recordings.get(shape.attention.form())
        pages = page_count(plan, self._means.store.shape.page_size, plan.steps)
        if not isinstance(recording, Recording) or pages > shape.inputs.capacity:
            return None
        found = shape.inputs.feeds(plan, plan.steps)
        return StepReplays(
            recording,
            shape.inputs.tokens_T,
            found.feeds,
            shape.attention.remote_bytes_each(found.remote_S),
            shape.attention_bytes,
            shape.linear_bytes,
            shape.physical_bytes,
        )

    def _padded(self, rows: int) -> int:
        """Rows of the shape that a step is computed in: a graph costs memory and a moment to
        capture, and a few rows more cost a GPU nothing."""
        if self._recorder is None or not self._recorder.padded:
            return rows
        return next(size for size in PADDED if size >= rows)

    def _shape(self, plan: StepPlan, links: GroupLinks, context: MakeContext) -> _Shape:
        rows = self._padded(len(plan.sequences))
        key = (plan.group, plan.placement, rows)
        shape = self._shapes.get(key)
        pages = page_count(plan, self._means.store.shape.page_size) + rows - len(plan.sequences)
        if shape is None or shape.inputs.capacity < pages:
            inputs = decode_inputs(plan, self._means, capacity_for(pages), rows)
            attention = DecodeAttention(inputs, self._means, links.sp)
            made = _Shape(inputs, attention, context(plan, links, inputs.positions_T, attention))
            if shape is not None:
                made.refused = shape.refused
            shape = self._shapes[key] = made
        self._shapes.move_to_end(key)
        while len(self._shapes) > self._limit:
            self._shapes.popitem(last=False)
        return shape

    def _run(self, shape: _Shape, links: GroupLinks) -> Tensor:
        """Through the model's code, recording it where it can be."""

        def work() -> Tensor:
            shape.attention.begin()
            return self._compute(shape.inputs.tokens_T, shape.context)

        if self._recorder is None or shape.refused or not links.recordable:
            return work()
        before = _counts(self._means.traffic)
        logits_RV, recording = self._recorder.record(work)
        self._keep(shape, recording, len(logits_RV))
        after = _counts(self._means.traffic)
        shape.attention_bytes, shape.linear_bytes, shape.physical_bytes = (
            new - old for new, old in zip(after, before, strict=True)
        )
        return logits_RV

    @staticmethod
    def _keep(shape: _Shape, recording: Replayable | str, rows: int) -> None:
        form = shape.attention.form()
        if None in form:
            recording = "its page lists need other kernels in every step"
        if isinstance(recording, str):
            shape.refused = recording
            logger.debug("steps of %d rows are not recorded: %s", rows, recording)
        else:
            shape.recordings[form] = recording

    def _replay(self, shape: _Shape, recording: Replayable) -> Tensor:
        logits_RV = self._replayed(recording)
        traffic = self._means.traffic
        traffic.attention_bytes += shape.attention_bytes
        traffic.linear_bytes += shape.linear_bytes
        traffic.physical_bytes += shape.physical_bytes
        return logits_RV

    def _replayed(self, recording: Replayable) -> Tensor:
        if not self._timeline.on or not isinstance(recording, Recording):
            return recording.replay()
        clock_ns = torch.zeros(len(recording) + 1, dtype=torch.int64)
        logits_RV = recording.replay(clock_ns)
        calls = zip(recording.names, pairwise(clock_ns.tolist()), strict=True)
        for name, (began_ns, ended_ns) in calls:
            self._timeline.add(name, "kernel", began_ns, ended_ns)
        return logits_RV


def _counts(traffic: Traffic) -> tuple[int, int, int]:
    return traffic.attention_bytes, traffic.linear_bytes, traffic.physical_bytes

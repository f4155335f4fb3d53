"""Micro-batches of one long prefill in flight at once: messages travel while other tokens compute.

The three-phase pipeline of SPS between hosts. A step's tokens are cut into blocks of positions, and
every rank runs the model over each block in a thread of its own. One thread computes at a time; who
must wait for a message lends the core to the next block. What a block made for others leaves as
soon as it is made, before its own attention and mostly a layer before a reader waits for it.

Every member derives the same blocks and messages from the plan. What crosses, and who attends to
what, is a strategy's own: `pass_kv`, `ulysses`, `csa`, `stride`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.page_reads import Mask, needed
from sps_runtime.attention.sequence_parallel.in_flight.baton import Baton
from sps_runtime.attention.sequence_parallel.in_flight.cut import cut
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints, Runs, ShardLayout
from sps_runtime.distributed.communicator import Pending
from sps_runtime.registry import resolve
from sps_runtime.types.plan import StepPlan

LEAD = 3
"""Layers that a block may be ahead of another, and that room for messages is made ahead: what
staged pages of so many layers take is the pipeline's price in memory."""
HURRY = 1 << 20
"""Taken off a turn's layer by what is short and lets others begin: it goes first."""
BEGIN = -1
"""The layer of a turn that begins: before any block attends, all have made what others wait for."""
OLD = 0
"""The parcel of pages that were there before the step; block b's is 1 + b."""

_HERE = "sps_runtime.attention.sequence_parallel.in_flight"
FLYING = {
    "pass_kv": f"{_HERE}.pass_kv:FlyingPassKV",
    "ulysses": f"{_HERE}.ulysses:FlyingUlysses",
    "csa": f"{_HERE}.csa:FlyingCsa",
    "stride": f"{_HERE}.stride:FlyingStride",
}
"""Strategy -> ``module:class``; each class takes a `Flight` and is a `Flying`."""


class Flying(Protocol):
    """A strategy whose blocks fly.

    Attributes:
        everywhere: every rank attends in every block, whoever has its tokens.
    """

    everywhere: bool

    def wrote(self, block: int, layer: int) -> None:
        """A block's KV lies in the pool, before anybody is told."""
        ...

    def finish(self) -> None:
        """All blocks are done: wait for what the strategy has still under way."""
        ...

    def attend(
        self,
        block: int,
        layer: int,
        q_THD: Tensor,
        kv_heads: int,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one block, whose KV has been written: send, `Flight.go_on`, attend. Called
        with the baton, which it lends while it waits (`Flight.wait`)."""
        ...


Turn = tuple[int, int]
"""(layer, block), as `Baton` orders them."""


def flight_of(plan: StepPlan, layout: ShardLayout, context: AttentionContext) -> Flight | None:
    """How a step flies; None where it does not: in one host pages are read in place and have
    nothing to hide, TP peers would have to agree on an order, and steps of several sequences have
    work beside one another as it is."""
    spans = len({context.hosts[rank] for rank in plan.group}) > 1
    single = len(plan.sequences) == 1 and context.mesh.tp_size == 1
    if not spans or not single or plan.placement != "sharded":
        return None
    name: str = plan.strategy
    sparse = layout.sparse[0]
    if sparse is not None:
        whole = bool(context.windows) and not any(context.windows)
        name = ("stride" if sparse.estimator == "stride" else "csa") if whole else ""
    owners = layout.pages.owners
    if name not in FLYING or (owners == owners[0]).all():
        return None
    plans = cut(plan, layout)
    return Flight(name, plans, layout, context) if len(plans) > 1 else None


class Flight:
    """What the blocks of one step share on one rank.

    Args:
        name: of `FLYING`.
        plans: from `cut`.
        layout: of the whole step.

    Attributes:
        layouts, steps: of each block.
        step: the whole step.
        rows: (begin, end) of each block's rows among the step's on this rank.
        blocks: those that fly on this rank.
        turns: where each of them stands.
    """

    def __init__(
        self, name: str, plans: Sequence[StepPlan], layout: ShardLayout, context: AttentionContext
    ) -> None:
        self.plans, self.layout, self.context = plans, layout, context
        self.baton = Baton()
        shape = context.store.shape
        self.layouts = [
            ShardLayout(plan, page_size=shape.page_size, pages_per_rank=shape.slots)
            for plan in plans
        ]
        self.step = StepState(layout, context)
        self.steps = [StepState(of_block, context) for of_block in self.layouts]
        mine = [layout.rows[self.step.me] for layout in self.layouts]
        ends = np.cumsum(mine).tolist()
        self.rows = list(zip([0, *ends[:-1]], ends, strict=True))
        factory = resolve("strategy in flight", FLYING, name)
        self._posting = threading.Lock()
        self._sends: dict[int, list[Pending]] = {}
        self.strategy: Flying = factory(self)
        some = tuple(block for block, rows in enumerate(mine) if rows)
        self.blocks = tuple(range(len(plans))) if self.strategy.everywhere else some or (0,)
        self._written = dict.fromkeys(self.blocks, -1)
        self.turns = {block: (BEGIN, block) for block in self.blocks}

    def parcels(self) -> Ints:
        """The parcel of each page of the step's table."""
        size = self.layout.page_size
        found = np.full(len(self.layout.pages.ids), OLD, dtype=np.int64)
        for block, plan in enumerate(self.plans):
            found[plan.sequences[0].start // size :] = 1 + block
        return found

    def sees(self, block: int, runs: Runs, window: int | None) -> Mask:
        """Pages of the step's table that runs of a block may see."""
        found = np.zeros(len(self.layout.pages.ids), dtype=np.bool_)
        mask = needed(self.layouts[block], runs, window)
        found[: len(mask)] = mask
        return found

    def attention(self, block: int) -> BlockAttention:
        """The `layers.step.SequenceAttention` of one block."""
        return BlockAttention(self, block, self.steps[block])

    def enter(self, block: int, layer: int) -> None:
        """Wait for blocks that are too far behind."""
        self._wait_for((layer, block), lambda: min(self._written.values()) >= layer - LEAD)

    def wrote(self, block: int, layer: int) -> None:
        """A block's KV of a layer lies in the pool."""
        with self.baton.changed:
            self._written[block] = layer
            self.baton.changed.notify_all()
        if min(self._written.values()) == layer:
            self.step.publish(layer)

    def offer(self, block: int) -> None:
        """Between two operations of a block: let those compute that stand before it."""
        self.baton.offer(self.turns[block])

    def go_on(self, block: int, layer: int, turn: Turn) -> None:
        """Everything that others need has left: let those compute that stand before this turn, and
        wait for the KV of the blocks before it."""
        self.baton.offer(turn)
        self.follow(block, layer, turn)

    def follow(self, block: int, layer: int, turn: Turn) -> None:
        """Wait for a layer's KV of the blocks before one."""
        earlier = [other for other in self.blocks if other < block]
        self._wait_for(turn, lambda: all(self._written[other] >= layer for other in earlier))

    def read_in_place(self, turn: Turn, layer: int, members: Sequence[int]) -> None:
        """Wait until members' KV of a layer can be read in their pools."""
        if members:
            with self.baton.lent(turn):
                for member in members:
                    peer = self.step.peers[member]
                    self.context.fence.wait(peer, self.layout.epoch, layer)

    def post(
        self,
        kind: int,
        layer: int,
        number: int,
        send: Sequence[Tensor | None],
        recv: Sequence[Tensor | None],
    ) -> Pending:
        """Begin to send to, and to receive from, each member; None for nothing. Messages of one
        (kind, layer, number) keep their order between two members; others need not."""
        nothing = self.context.store.own.k.new_empty(0)
        tag = 1 + (kind * self.context.store.shape.layers + layer) * (len(self.plans) + 1) + number
        send, recv = ([nothing if x is None else x for x in side] for side in (send, recv))
        with self._posting:
            return self.step.start(send, recv, tag)

    def send(
        self, block: int, kind: int, layer: int, number: int, messages: Sequence[Tensor | None]
    ) -> None:
        """Let messages leave, and wait for those that left long ago."""
        pending = self.post(kind, layer, number, messages, [None] * self.step.size)
        self._sends.setdefault(layer, []).append(pending)
        for old in [known for known in self._sends if known < layer - LEAD]:
            self.wait((layer, block), self._sends.pop(old))

    def wait(self, turn: Turn, pending: Sequence[Pending]) -> None:
        """Wait for messages while others compute."""
        with self.baton.lent(turn):
            for one in pending:
                one.wait()

    def finish(self) -> None:
        """All blocks are done: wait until everything has left, and count what was waited."""
        began = time.monotonic()
        for pending in self._sends.values():
            for one in pending:
                one.wait()
        self.strategy.finish()
        self.context.traffic.exposed_s += self.baton.idle_s + time.monotonic() - began

    def _wait_for(self, turn: Turn, may: Callable[[], bool]) -> None:
        baton = self.baton

        def go() -> bool:
            baton.check()
            return may()

        with baton.changed:
            if go():
                return
        with baton.lent(turn), baton.changed:
            baton.changed.wait_for(go)


class BlockAttention:
    """Attention of one block: `layers.step.SequenceAttention`."""

    def __init__(self, flight: Flight, block: int, step: StepState) -> None:
        self._flight, self._block, self._step = flight, block, step

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
        flight, block = self._flight, self._block
        flight.turns[block] = (layer, block)
        flight.enter(block, layer)
        self._step.write(layer, k_TKD, v_TKD)
        flight.strategy.wrote(block, layer)
        flight.wrote(block, layer)
        return flight.strategy.attend(
            block, layer, q_THD, k_TKD.shape[1], scale=scale, window=window
        )

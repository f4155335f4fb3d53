"""Micro-batches of one long prefill in flight at once: pages travel while other tokens compute.

The three-phase pipeline of SPS between hosts. A step's tokens are cut into blocks of positions, and
every rank runs the model over each block in a thread of its own. One thread computes at a time; who
must wait for pages lends the core to the next block. So KV of one block crosses the wire while
another block's projections, feed-forward and local attention are computed, and what a block wrote
leaves as soon as it is written, layers before the reader asks for it.

Every member derives the same blocks and shipments from the plan. A page crosses once a layer for
each reader, with the first of the reader's blocks that sees it; later blocks find it staged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
from torch import Tensor

from sps_runtime.attention.backend import PagePool, Partial, QueryRun
from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.page_reads import Mask, cut_pieces, needed, query_runs
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.distributed.communicator import Pending
from sps_runtime.kvstore.transfer import Shipment, Staging
from sps_runtime.ops.merge_state import merge_state
from sps_runtime.types.attention import EXACT
from sps_runtime.types.plan import StepPlan

LEAD = 3
"""Layers that a block may be ahead of another, and that pages may arrive before they are read: what
staged pages of so many layers take is the pipeline's price in memory."""
MIN_PAGES = 2
"""New pages of a block, at least: smaller ones cost more calls than they hide."""
MOST_BLOCKS = 16


def applies(plan: StepPlan, context: AttentionContext) -> bool:
    """Whether a step can be flown: one sequence's exact pass-KV prefill, every rank on its own host
    (pages that are read in place have nothing to hide), no TP peers to keep in step with."""
    hosts = [context.hosts[rank] for rank in plan.group]
    apart = len(set(hosts)) == len(hosts) > 1
    kind = plan.placement == "sharded" and plan.strategy == "pass_kv"
    exact = all(sequence.attention == EXACT for sequence in plan.sequences)
    return apart and kind and exact and len(plan.sequences) == 1 and context.mesh.tp_size == 1


def cut(plan: StepPlan, layout: ShardLayout) -> list[StepPlan]:
    """The plan of a single sequence as consecutive blocks of positions, each a plan whose sequence
    ends with the block. Cuts lie where pages change owners (so a zigzag's blocks stay whole), or,
    where that is too often, at even distances.

    Returns:
        One plan where there is nothing to gain.
    """
    (sequence,) = plan.sequences
    size, end = layout.page_size, sequence.start + sequence.count
    first = sequence.start // size
    owners = layout.pages.owners[first:]
    changes = np.flatnonzero(np.diff(owners)) + 1
    blocks = min(2 * len(plan.group), MOST_BLOCKS, len(owners) // MIN_PAGES)
    if not 1 <= len(changes) < blocks:
        changes = np.arange(1, blocks) * len(owners) // max(1, blocks)
    stops = [(first + int(change)) * size for change in changes] + [end]
    starts = [sequence.start, *stops[:-1]]
    return [
        msgspec.structs.replace(
            plan,
            sequences=(msgspec.structs.replace(sequence, start=start, count=stop - start),),
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


class Baton:
    """One thread computes at a time: of those that can go on, the one in the earliest layer, and
    there the earliest block, for which others wait.

    Attributes:
        changed: told whenever somebody else may go on.
        waiting: turns of those that want to compute.
        idle_s: seconds in which nobody computed.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.idle_s = 0.0
        self._holder: tuple[int, int] | None = None
        self.waiting: set[tuple[int, int]] = set()
        self._idle_since = time.monotonic()
        self._failed = False

    def take(self, turn: tuple[int, int]) -> None:
        """Wait for the right to compute; `turn` is (layer, block)."""
        with self.changed:
            self.waiting.add(turn)
            self.changed.wait_for(lambda: self._failed or self._is_next(turn))
            self.waiting.discard(turn)
            self.check()
            self.idle_s += time.monotonic() - self._idle_since
            self._holder = turn

    def give(self) -> None:
        """Let another compute."""
        with self.changed:
            self._holder = None
            self._idle_since = time.monotonic()
            self.changed.notify_all()

    def offer(self, turn: tuple[int, int]) -> None:
        """Let those go first who want to and stand before this turn."""
        with self.changed:
            if not self.waiting or turn < min(self.waiting):
                return
        self.give()
        self.take(turn)

    @contextmanager
    def lent(self, turn: tuple[int, int]) -> Iterator[None]:
        """Lend the core to others while the body waits for something that computes nothing."""
        self.give()
        yield
        self.take(turn)

    def fail(self) -> None:
        """Wake everyone who waits: a block has failed."""
        with self.changed:
            self._failed = True
            self.changed.notify_all()

    def check(self) -> None:
        """Raise ConnectionError when another block has failed."""
        if self._failed:
            raise ConnectionError("another micro-batch of the step failed")

    def _is_next(self, turn: tuple[int, int]) -> bool:
        return self._holder is None and min(self.waiting) == turn


@dataclass(frozen=True)
class _Routes:
    """What crosses in each layer, for one window; by block.

    Attributes:
        staging: where all pages of a layer arrive, source ``block * members + owner``.
        sent: per block, a shipment for each reader.
        here: runs over this rank's own pages.
        there: runs over staged pages.
    """

    staging: Staging
    sent: list[list[Shipment]]
    here: list[list[QueryRun]]
    there: list[list[QueryRun]]


@dataclass
class _Arrivals:
    """The pages of one layer on their way here."""

    pool: Tensor
    pending: list[Pending]
    locks: list[threading.Lock]
    arrived: list[bool]
    left: int = 0


@dataclass
class Flight:
    """What the blocks of one step share on one rank.

    Args:
        plans: from `cut`.
        layout: of the whole step.

    Attributes:
        layouts: of each block.
        rows: (begin, end) of each block's rows among the step's on this rank.
    """

    plans: Sequence[StepPlan]
    layout: ShardLayout
    context: AttentionContext
    baton: Baton = field(default_factory=Baton)

    def __post_init__(self) -> None:
        shape = self.context.store.shape
        self.layouts = [
            ShardLayout(plan, page_size=shape.page_size, pages_per_rank=shape.slots)
            for plan in self.plans
        ]
        self.step = StepState(self.layout, self.context)
        mine = [layout.rows[self.step.me] for layout in self.layouts]
        ends = np.cumsum(mine).tolist()
        self.rows = list(zip([0, *ends[:-1]], ends, strict=True))
        self._written = [-1] * len(self.plans)
        self._arrivals: dict[int, _Arrivals] = {}
        self._sends: dict[int, list[Pending]] = {}
        self._routes: dict[int | None, _Routes] = {}

    def attention(self, block: int) -> BlockAttention:
        """The `layers.step.SequenceAttention` of one block."""
        return BlockAttention(self, block, StepState(self.layouts[block], self.context))

    def routes(self, window: int | None) -> _Routes:
        routes = self._routes.get(window)
        if routes is None:
            routes = self._routes[window] = _plan_routes(self, window)
        return routes

    def wrote(self, block: int, layer: int) -> None:
        """A block's KV of a layer lies in the pool; wait for that of the blocks before it, and for
        blocks that are too far behind."""
        turn = (layer, block)
        with self.baton.changed:
            self._written[block] = layer
            self.baton.changed.notify_all()
            if self._may_go(block, layer):
                return
        with self.baton.lent(turn), self.baton.changed:
            self.baton.changed.wait_for(lambda: self._may_go(block, layer))

    def _may_go(self, block: int, layer: int) -> bool:
        self.baton.check()
        earlier = all(written >= layer for written in self._written[:block])
        return earlier and min(self._written) >= layer - LEAD

    def send(self, block: int, layer: int, routes: _Routes) -> None:
        """Let a block's shipments of a layer leave, and wait for those that left long ago."""
        own = self.context.store.own
        k, v = own.k[layer], own.v[layer]
        heads = (0, k.shape[1])
        messages = [shipment.pack(k, v, heads) for shipment in routes.sent[block]]
        nothing = [k.new_empty(0)] * len(messages)
        pending = self.step.start(messages, nothing, self._tag(layer, block))
        self._sends.setdefault(layer, []).append(pending)
        for old in [known for known in self._sends if known < layer - LEAD]:
            self._wait_all((layer, block), self._sends.pop(old))

    def expect(self, layer: int, routes: _Routes) -> None:
        """Have room for the pages of this layer and of some more, so that they need not wait."""
        last = min(layer + LEAD, self.context.store.shape.layers)
        for ahead in range(layer, last):
            if ahead not in self._arrivals:
                self._arrivals[ahead] = self._expect(ahead, routes)

    def _expect(self, layer: int, routes: _Routes) -> _Arrivals:
        k, members = self.context.store.own.k[layer], self.step.size
        pool, parts = routes.staging.allocate(k, k.shape[1])
        nothing, pending = [k.new_empty(0)] * members, []
        for block in range(len(self.plans)):
            recv = parts[block * members : (block + 1) * members]
            pending.append(self.step.start(nothing, recv, self._tag(layer, block)))
        blocks = len(self.plans)
        return _Arrivals(pool, pending, [threading.Lock() for _ in pending], [False] * blocks)

    def arrived(self, block: int, layer: int, routes: _Routes) -> PagePool:
        """All pages of a layer that blocks up to this one wait for."""
        arrivals = self._arrivals[layer]
        for earlier in range(block + 1):
            if arrivals.arrived[earlier]:
                continue
            with self.baton.lent((layer, block)), arrivals.locks[earlier]:
                if not arrivals.arrived[earlier]:
                    arrivals.pending[earlier].wait()
                    first = earlier * self.step.size
                    for source in range(first, first + self.step.size):
                        routes.staging.spread(arrivals.pool, source)
                    arrivals.arrived[earlier] = True
        k, v = arrivals.pool.unbind(1)
        return PagePool([k], [v], routes.staging.slots)

    def leave(self, layer: int) -> None:
        """A block is done with a layer; the last one takes its staged pages away."""
        arrivals = self._arrivals[layer]
        arrivals.left += 1
        if arrivals.left == len(self.plans):
            del self._arrivals[layer]

    def finish(self) -> None:
        """All blocks are done: wait until everything has left, and count what was waited."""
        began = time.monotonic()
        for pending in self._sends.values():
            for one in pending:
                one.wait()
        self.context.traffic.exposed_s += self.baton.idle_s + time.monotonic() - began

    def _wait_all(self, turn: tuple[int, int], pending: Sequence[Pending]) -> None:
        with self.baton.lent(turn):
            for one in pending:
                one.wait()

    def _tag(self, layer: int, block: int) -> int:
        return 1 + layer * len(self.plans) + block


@dataclass(frozen=True)
class BlockAttention:
    """Attention of one block: pages that are here first, then those that came."""

    flight: Flight
    block: int
    step: StepState

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
        flight, block = self.flight, self.block
        backend, context = flight.context.backend, flight.context
        flight.baton.offer((layer, block))
        routes = flight.routes(window)
        self.step.write(layer, k_TKD, v_TKD)
        flight.wrote(block, layer)
        flight.expect(layer, routes)
        flight.send(block, layer, routes)
        own = context.pages(layer)
        partial = backend.partial(q_THD, routes.here[block], own, scale=scale, window=window)
        if routes.there[block]:
            staged = flight.arrived(block, layer, routes)
            there = routes.there[block]
            other = backend.partial(q_THD, there, staged, scale=scale, window=window)
            partial = Partial(*merge_state(partial.o, partial.lse, other.o, other.lse))
        flight.leave(layer)
        return partial.o.to(q_THD.dtype)


def _plan_routes(flight: Flight, window: int | None) -> _Routes:
    step, layout = flight.step, flight.layout
    blocks, members, me = len(flight.plans), step.size, step.me
    owners = layout.pages.owners
    need = [[_need(flight, block, reader, window) for reader in range(members)]
            for block in range(blocks)]  # fmt: skip
    first = _first_needed(need, len(owners))

    def shipped(block: int, owner: int, reader: int) -> Ints:
        if owner == reader:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero((first[reader] == block) & (owners == layout.group[owner]))

    arriving = [shipped(block, owner, me) for block in range(blocks) for owner in range(members)]
    staging = Staging([step.shipment(index) for index in arriving])
    place = np.full(len(owners), -1, dtype=np.int32)
    for source, index in enumerate(arriving):
        place[index] = staging.page_ids(source)
    mine = owners == step.context.mesh.sp_rank
    here, there = [], []
    for block in range(blocks):
        held = np.zeros(len(owners), dtype=bool)
        held[: len(need[block][me])] = need[block][me]
        here.append(_runs(flight, block, np.flatnonzero(held & mine), window))
        index = np.flatnonzero(held & ~mine)
        there.append(_runs(flight, block, index, window, place[index]))
    sent = [
        [step.shipment(shipped(block, me, reader)) for reader in range(members)]
        for block in range(blocks)
    ]
    return _Routes(staging, sent, here, there)


def _need(flight: Flight, block: int, reader: int, window: int | None) -> Mask:
    layout = flight.layouts[block]
    return needed(layout, layout.runs(reader), window)


def _first_needed(need: Sequence[Sequence[Mask]], pages: int) -> list[Ints]:
    """Per reader, the first block in which it needs each page; -1 for none."""
    found = []
    for reader in range(len(need[0])):
        first = np.full(pages, -1, dtype=np.int64)
        for block in reversed(range(len(need))):
            first[np.flatnonzero(need[block][reader])] = block
        found.append(first)
    return found


def _runs(
    flight: Flight, block: int, index: Ints, window: int | None, ids: Ints | None = None
) -> list[QueryRun]:
    layout = flight.layouts[block]
    pieces = cut_pieces(layout, layout.runs(flight.step.me), index, window)
    return query_runs(layout, pieces, index, page_ids=ids)

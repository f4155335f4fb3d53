"""Block-sparse attention in flight: three phases of every block overlap with other blocks.

A block is a few superblocks of one rank. When its KV is written, summaries of its pages leave for
every member that comes later; when those of earlier pages have come, it chooses, asks the owners
and, while keys and then values are on their way, others compute. An owner answers from a thread of
its own for each block that may ask, at no block's turn.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.page_reads import Mask, cut_pieces, needed, query_runs
from sps_runtime.attention.sequence_parallel.csa.bound import hold
from sps_runtime.attention.sequence_parallel.csa.counts import BlockCounts, SparseCounts
from sps_runtime.attention.sequence_parallel.csa.far_pages import FarPages, Mirror, Units, pack_bits
from sps_runtime.attention.sequence_parallel.csa.measure import SparseMeasure
from sps_runtime.attention.sequence_parallel.csa.new_summaries import NewSummaries
from sps_runtime.attention.sequence_parallel.csa.rows import SparseRows
from sps_runtime.attention.sequence_parallel.in_flight.far_answers import (
    KEYS,
    QUESTIONS,
    SUMMARIES,
    VALUES,
    Answer,
    Clerk,
    Coming,
)
from sps_runtime.attention.sequence_parallel.in_flight.far_weights import FlyingWeights
from sps_runtime.attention.sequence_parallel.in_flight.flight import HURRY, LEAD, OLD, Flight, Turn
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints, Runs
from sps_runtime.attention.sparse_audit import asks_owners, reads_everything
from sps_runtime.attention.sparse_blocks import (
    SparseBlocks,
    alone_pages,
    sparse_blocks,
    split_runs,
    summaries_due,
)
from sps_runtime.types.attention import SparseCounters


@dataclass
class _Layer:
    """What came and comes in one layer.

    Attributes:
        asked: ``[pages, kv_heads]`` that some block has asked for.
        counted: of `BlockCounts`.
        answers: to what blocks asked.
        done: blocks that are done with the layer.
    """

    mirror: Mirror
    summaries: Coming
    asked: Mask
    counted: Mask
    answers: list[Answer] = field(default_factory=list)
    done: int = 0


@dataclass(frozen=True)
class _Block:
    """One block on this rank.

    Attributes:
        written: the summaries of the pages that it fills.
        sparse: its query blocks, in the order of its rows.
        alone: its row that reads all pages, if it has one.
        far: pages of other hosts that its rows may read.
        members: those on this host whose pages they may read.
        parcels: those that bring summaries of pages that it may choose.
    """

    step: StepState
    written: NewSummaries
    sparse: list[SparseBlocks]
    alone: Runs
    far: Mask
    members: tuple[int, ...]
    parcels: list[int]


class FlyingCsa:
    """`flight.Flying` of a step that prefills one sequence sparsely."""

    everywhere = False

    def __init__(self, flight: Flight) -> None:
        self._flight, step, layout = flight, flight.step, flight.layout
        size, me = step.size, step.me
        split = [split_runs(layout, member) for member in range(size)]
        self._see = [
            [flight.sees(block, of_block.runs(member), None) for member in range(size)]
            for block, of_block in enumerate(flight.layouts)
        ]
        need = [np.logical_or.reduce([of[member] for of in self._see]) for member in range(size)]
        self._far = FarPages(step, need)
        self._parcel = flight.parcels()
        self._blocks = [self._block(block) for block in range(len(flight.plans))]
        alone = alone_pages(layout, split[me][1])
        self._counts = SparseCounts(
            step, needed(layout, split[me][0], None), alone, summaries_due(layout, need[me])
        )
        found = [sparse_blocks(layout, sparse) for sparse, _ in split]
        self._measure = SparseMeasure(step, self._counts, found)
        self._layers: dict[int, _Layer] = {}
        self._old_sent: set[int] = set()
        settings = layout.sparse[0]
        assert settings is not None
        self._whole, self._held = reads_everything(settings), asks_owners(settings)
        self._weights = FlyingWeights(flight, self._counts)
        self._clerks: list[threading.Thread] = []
        self._late: list[tuple[int, Coming]] = []
        self._started = False

    def finish(self) -> None:
        """Wait until every question of other hosts has been answered, and for summaries that no
        block has asked for."""
        for clerk in self._clerks:
            clerk.join()
        for layer, coming in self._late:  # later steps count on them
            for parcel in coming.pending:
                self._keep(layer, coming, parcel)

    def wrote(self, block: int, layer: int) -> None:
        """Summarise the pages that a block filled."""
        self._blocks[block].written.write(layer)

    def counters(self) -> tuple[SparseCounters, ...]:
        """As `csa.prefill.SparsePassKV.counters`; a collective call."""
        self._measure.finish()
        return self._counts.of_sequences()

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
        if window is not None:
            raise ValueError("layers with a window do not fly under csa")
        flight, mine = self._flight, self._blocks[block]
        state = self._visit(block, layer, q_THD, scale)
        first = (layer - HURRY, block)  # choosing is short, and a wire may wait for the question
        flight.follow(block, layer, first)
        flight.read_in_place(first, layer, mine.members)
        self._learn(block, layer, first, state.summaries)
        rows = [self._rows(block, layer, state, q_THD, part, scale) for part in mine.sparse]
        coming = [self._weights.ask(block, layer, part.audited_queries()) for part in rows]
        wanted = self._wanted(block, rows)
        self._ask(0, block, layer, state, wanted)
        flight.baton.offer((layer, block))
        self._receive(block, layer, state, wanted)
        partials = self._alone(block, layer, state, q_THD, scale)
        for part, weights in zip(rows, coming, strict=True):
            part.attend(state.mirror.pool)
            if weights is not None and part.bound is not None:
                self._weights.add(block, layer, weights, part.bound)
        self._hold(block, layer, state, rows)
        partials += [partial for part in rows for partial in part.partials()]
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        if len(out_THD):
            flight.context.backend.merge(partials, out_THD)
        state.done += 1
        if state.done == len(flight.blocks):
            self._late.append((layer, self._layers.pop(layer).summaries))
        return out_THD

    # -- before a block's own attention: what others wait for

    def _visit(self, block: int, layer: int, q_THD: Tensor, scale: float) -> _Layer:
        if not self._started:
            self._started = True
            self._start_clerks(q_THD, scale)
        last = min(layer + LEAD, self._flight.context.store.shape.layers)
        for ahead in range(layer, last):
            if ahead not in self._layers:
                self._layers[ahead] = self._expect(ahead)
                self._counts.begin_layer()
                self._measure.begin_layer(ahead, q_THD, scale)
        if layer not in self._old_sent:
            self._old_sent.add(layer)
            self._tell(block, layer, OLD)
        self._tell(block, layer, 1 + block)
        return self._layers[layer]

    def _start_clerks(self, q_THD: Tensor, scale: float) -> None:
        """A thread for each block of other hosts that may ask for own pages."""
        flight, blocks = self._flight, len(self._flight.plans)
        questions = QUESTIONS if self._held else QUESTIONS[:1]
        for reader, block in itertools.product(range(flight.step.size), range(blocks)):
            index = self._askable(flight.step.me, reader, block)
            if not len(index):
                continue
            route = self._weights.route(block, flight.step.me, reader)
            asks = reader, block, index, questions, route
            clerk = Clerk(flight, self._far, *asks, q_THD[:0], scale)
            name = f"answers-{reader}-{block}"
            self._clerks.append(threading.Thread(target=clerk.serve, name=name, daemon=True))
            self._clerks[-1].start()

    def _tell(self, block: int, layer: int, parcel: int) -> None:
        me, size = self._flight.step.me, self._flight.step.size
        messages = [
            self._far.summaries_of(layer, self._due(parcel, me, reader)) for reader in range(size)
        ]
        if any(message is not None for message in messages):
            self._flight.send(block, SUMMARIES, layer, parcel, messages)

    def _expect(self, layer: int) -> _Layer:
        flight, far = self._flight, self._far
        size, me = flight.step.size, flight.step.me
        coming, rooms = {}, {}
        for parcel in range(len(flight.plans) + 1):
            parts = [far.summaries_room(self._due(parcel, owner, me)) for owner in range(size)]
            if any(part is not None for part in parts):
                rooms[parcel] = parts
                coming[parcel] = flight.post(SUMMARIES, layer, parcel, [None] * size, parts)
        asked, counted = self._nothing(), np.stack((self._nothing(), self._nothing()))
        mirror = Mirror(flight.step, layer)
        locks = {parcel: threading.Lock() for parcel in coming}
        return _Layer(mirror, Coming(coming, rooms, locks), asked, counted)

    # -- a block's own

    def _learn(self, block: int, layer: int, turn: Turn, coming: Coming) -> None:
        """Wait for the summaries of all pages that it may choose."""
        mine = [parcel for parcel in self._blocks[block].parcels if parcel in coming.pending]
        if not coming.known.issuperset(mine):
            with self._flight.baton.lent(turn):
                for parcel in mine:
                    self._keep(layer, coming, parcel)

    def _keep(self, layer: int, coming: Coming, parcel: int) -> None:
        with coming.locks[parcel]:
            if parcel in coming.known:
                return
            coming.pending[parcel].wait()
            for owner, came in enumerate(coming.rooms.pop(parcel)):
                index = self._due(parcel, owner, self._flight.step.me)
                self._far.keep_summaries(layer, owner, index, came)
            coming.known.add(parcel)

    def _rows(
        self,
        block: int,
        layer: int,
        state: _Layer,
        q_THD: Tensor,
        blocks: SparseBlocks,
        scale: float,
    ) -> SparseRows:
        counts = BlockCounts(self._counts, state.counted)
        mine, first_row = self._blocks[block], self._flight.rows[block][0]
        return SparseRows(
            mine.step,
            mine.written.operators,
            counts,
            self._measure,
            layer,
            q_THD,
            blocks,
            scale,
            first_row,
        )

    def _wanted(self, block: int, rows: Sequence[SparseRows]) -> Mask:
        """Pages of other hosts that a block reads, for each KV head."""
        mine, wanted = self._blocks[block], self._nothing()
        if len(mine.alone) or self._whole:
            wanted[:] = True
        else:
            for part in rows:
                chosen = part.choose()
                wanted[: len(chosen)] |= chosen
        wanted &= mine.far[:, None]
        return wanted

    def _hold(self, block: int, layer: int, state: _Layer, rows: Sequence[SparseRows]) -> None:
        """Widen what loses too much; where owners expect to be asked for more, ask them."""
        numbers = itertools.count(1)

        def bring(wanted: Mask) -> None:
            if self._held:
                wanted &= self._blocks[block].far[:, None]
                self._ask(next(numbers), block, layer, state, wanted)
                self._receive(block, layer, state, wanted)

        hold([part.bound for part in rows if part.bound is not None], self._nothing(), bring)

    def _ask(self, number: int, block: int, layer: int, state: _Layer, wanted: Mask) -> None:
        """Ask owners for what no block of this rank has asked for yet: the block's `number`-th
        question in the layer."""
        flight = self._flight
        size, me = flight.step.size, flight.step.me
        fresh = wanted & ~state.asked
        state.asked |= fresh
        index = [self._askable(owner, me, block) for owner in range(size)]
        questions = [pack_bits(fresh, places) for places in index]
        if all(question is None for question in questions):
            return
        own = flight.context.store.own
        units = [Units(flight.step, fresh, places) for places in index]
        parts = [[each.room(pool[layer]) for each in units] for pool in (own.k, own.v)]
        pending = [
            flight.post(kind, layer, block, [None] * size, part)
            for kind, part in zip((KEYS[number], VALUES[number]), parts, strict=True)
        ]
        state.answers.append(Answer(units, parts, pending, fresh))
        flight.send(block, QUESTIONS[number], layer, block, questions)
        for places in index:
            self._counts.ask(places)

    def _receive(self, block: int, layer: int, state: _Layer, wanted: Mask) -> None:
        """Wait for what a block wants, whichever block has asked for it."""
        for answer in list(state.answers):
            if answer.came or not (answer.wanted & wanted).any():
                continue
            with self._flight.baton.lent((layer, block)), answer.lock:
                if not answer.came:
                    self._put(state, answer)

    def _put(self, state: _Layer, answer: Answer) -> None:
        for side, (pending, parts) in enumerate(zip(answer.pending, answer.parts, strict=True)):
            pending.wait()
            for owner, (units, part) in enumerate(zip(answer.units, parts, strict=True)):
                units.put(part, self._far.owner_pool(state.mirror, owner)[side])
        answer.parts.clear()
        answer.came = True

    def _alone(
        self, block: int, layer: int, state: _Layer, q_THD: Tensor, scale: float
    ) -> list[Partial]:
        """The partial of a superblock of one token, which reads all pages."""
        mine, layout = self._blocks[block], self._flight.layouts[block]
        if not len(mine.alone):
            return []
        index, context = np.arange(len(layout.pages.ids)), self._flight.context
        near = mine.step.readable() & (layout.pages.owners != context.mesh.sp_rank)
        mine.step.count_in_place(int(layout.pages.tokens[near].sum()))
        runs = query_runs(layout, cut_pieces(layout, mine.alone, index, None), index)
        backend = self._flight.context.backend
        return [backend.partial(q_THD, runs, state.mirror.pool, scale=scale)]

    # -- who has what

    def _nothing(self) -> Mask:
        return np.zeros((self._far.table, self._far.kv_heads), dtype=np.bool_)

    def _askable(self, owner: int, reader: int, block: int) -> Ints:
        """Places of an owner's pages that a reader's block may ask for."""
        index = self._far.index(owner, reader)
        return index[self._see[block][reader][index]]

    def _due(self, parcel: int, owner: int, reader: int) -> Ints:
        index = self._far.due(owner, reader)
        of_parcel: Ints = index[self._parcel[index] == parcel]
        return of_parcel

    def _block(self, block: int) -> _Block:
        flight = self._flight
        step, layout = flight.steps[block], flight.layouts[block]
        sparse, alone = split_runs(layout, step.me)
        seen = self._see[block][step.me]
        far = seen & ~flight.step.readable()
        return _Block(
            step=step,
            written=NewSummaries(step),
            sparse=sparse_blocks(layout, sparse),
            alone=alone,
            far=far,
            members=flight.step.neighbours(seen),
            parcels=np.unique(self._parcel[far]).tolist(),
        )

"""A world of ranks in one process: one thread each, plans in, results out."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_contexts import PATIENCE_S, make_contexts
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.choose import choose_backend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.config.cache import kv_row
from sps_runtime.config.model import ModelConfig
from sps_runtime.config.parallel import Arch
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.native_links import NativeMailroom
from sps_runtime.distributed.regions import link_bytes
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.layers.step import LinearPlacement, StepContext
from sps_runtime.models.arena import Arena
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.loader import build_model
from sps_runtime.ops.dispatch import Ops, choose_ops
from sps_runtime.ops.kv_rows import storage_dtype
from sps_runtime.ops.recording import Recorder
from sps_runtime.runner.bursts import Bursts
from sps_runtime.runner.launched import POLL_S, Lane, Launched
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.steps_ahead import StepsAhead
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.sparse.dispatch import choose_operators, possible
from sps_runtime.types.plan import StepPlan, StepResult

SLOTS = 256


class RecordingModel:
    """A model that keeps the logits it gave, so that tests compare more than tokens."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.given: list[Tensor] = []

    def forward(self, input_ids_T: Tensor, step: StepContext) -> Tensor:
        return self._model.forward(input_ids_T, step)

    def logits(self, hidden_RD: Tensor, head: LinearPlacement) -> Tensor:
        logits_RV = self._model.logits(hidden_RD, head)
        self.given.append(logits_RV)
        return logits_RV

    def norm(self, x: Tensor) -> Tensor:
        return self._model.norm(x)

    def watch(self, runner: ModelRunner) -> None:
        """Keep the logits of decode steps, replayed ones too."""
        graphs: Any = runner._graphs
        run = graphs.run

        def kept(*arguments: Any) -> Tensor:
            logits_RV: Tensor = run(*arguments)
            self.given[:] = [logits_RV.clone()]
            return logits_RV

        graphs.run = kept


class Plans:
    """A rank's plans, and a descriptor that is readable from when one comes until it is asked
    whether any waits, as ZMQ's."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[StepPlan | None] = SimpleQueue()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK)

    def put(self, plan: StepPlan | None) -> None:
        self.queue.put(plan)
        os.eventfd_write(self.descriptor, 1)

    def waiting(self) -> bool:
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return not self.queue.empty()


class Watched:
    """A runner, and the logits that each of its steps sampled from."""

    def __init__(self, model: RecordingModel, runner: ModelRunner) -> None:
        self._model, self._runner = model, runner
        self.given: dict[int, list[Tensor]] = {}

    def runs_late(self, plan: StepPlan) -> bool:
        return self._runner.runs_late(plan)

    def launch(self, plan: StepPlan, late: bool) -> Launched:
        self._model.given.clear()
        launched = self._runner.launch(plan, late)
        if launched.ran.sampled or launched.ran.late:
            self.given[plan.epoch] = list(self._model.given[0])
        return launched


def next_plan(queue: SimpleQueue[StepPlan | None], lane: Lane) -> StepPlan | None:
    """As `runner.process` waits: for a plan or the end of a step, whichever comes first."""
    while lane.busy:
        try:
            return queue.get_nowait()
        except Empty:
            if not lane.poll():
                time.sleep(POLL_S)
    return queue.get()


@dataclass
class Answer:
    """What one rank gave for one plan: its result, and the logits it sampled from by slot."""

    result: StepResult
    logits: dict[int, Tensor]


def kv_shape(
    config: ModelConfig, tp: int, page_size: int, slots: int, dtype: torch.dtype, kv_dtype: str
) -> KVShape:
    """Of the pool of one rank."""
    row = (dtype.itemsize, 0) if kv_dtype == "auto" else kv_row(kv_dtype)
    return KVShape(
        layers=config.num_layers,
        slots=slots,
        kv_heads=config.kv_heads_per_rank(tp),
        page_size=page_size,
        head_dim=config.head_dim,
        itemsize=row[0],
        scale_bytes=row[1],
    )


class ThreadEngine:
    """Ranks of an (sp, tp) mesh.

    Args:
        arena: weights cut for `tp` ranks.
        hosts: host of each SP rank; all on one unless told. Pools of other hosts are not readable,
            and each host has a board of its own.
        ops: operators and attention; the kernels, where they are installed, unless told.
        kv_dtype: as `config.cache` has it.
        record: replay decode steps, where the kernels are installed and all is on one host.
        make_backend: makes each rank's attention backend.
        native: global ranks that run a burst's later steps in a native loop where they can, which
            needs `record`; all of them unless told.

    Attributes:
        loops: a rank for every burst whose later steps it ran so.
    """

    def __init__(
        self,
        config: ModelConfig,
        arena: Arena,
        *,
        sp: int = 1,
        tp: int = 1,
        arch: Arch = "ntp",
        page_size: int = 16,
        pages_per_rank: int = 256,
        hosts: tuple[int, ...] | None = None,
        ops: Ops | None = None,
        kv_dtype: str = "auto",
        pipeline: bool = True,
        record: bool = False,
        make_backend: Callable[[], AttentionBackend] | None = None,
        native: tuple[int, ...] | None = None,
    ) -> None:
        self._native = native
        self.loops: list[int] = []
        self.sp, self.tp, self._page_size = sp, tp, page_size
        self.results: SimpleQueue[Answer | None] = SimpleQueue()
        self.errors: list[BaseException] = []
        self._queues = [Plans() for _ in range(sp * tp)]
        self._waiting: dict[int, list[Answer]] = {}
        hosts = hosts or (0,) * sp
        dtype = arena.layout.dtype
        shape = kv_shape(config, tp, page_size, pages_per_rank, dtype, kv_dtype)
        world = ThreadWorld(sp * tp, timeout_s=PATIENCE_S)
        ops = ops or choose_ops()
        record = record and ops.kernels is not None and len(set(hosts)) == 1
        stored = storage_dtype(kv_dtype, dtype)
        shared = (world, shape, stored, sp, tp, hosts, ops, record)
        contexts = make_contexts(*shared, config.layer_windows, make_backend)
        boards = {host: mmap.mmap(-1, board_bytes(SLOTS)) for host in hosts}
        self.models, self.runners, self.told = [], [], []
        for rank, means in enumerate(contexts):
            model = build_model(config, arena, rank % tp, ops=ops.operators)
            board = TokenBoard(boards[hosts[means.mesh.sp_rank]])
            self.models.append(RecordingModel(model))
            runner = ModelRunner(
                self.models[rank],
                config.vocab_size,
                means,
                board,
                arch,
                PATIENCE_S,
                pipeline=pipeline,
                recorder=Recorder(ops.kernels) if record and ops.kernels else None,
            )
            self.models[rank].watch(runner)
            self.runners.append(runner)
        self._threads = threading.Thread(target=self._run, args=(world,), daemon=True)
        self._threads.start()

    def _run(self, world: ThreadWorld) -> None:
        try:
            world.run(self._rank_loop)
        except BaseException as error:
            self.errors.append(error)

    def _rank_loop(self, rank: int) -> None:
        watched, bursts = Watched(self.models[rank], self.runners[rank]), self._bursts(rank)

        def answer(result: StepResult) -> None:
            given = watched.given.pop(result.epoch, ())
            slots = [token.slot for token in result.sampled] if given else []
            if result.error is None:
                self.results.put(Answer(result, dict(zip(slots, given, strict=True))))

        lane, queue = Lane(watched, rank, answer), self._queues[rank].queue
        try:
            while (plan := next_plan(queue, lane)) is not None:
                if plan.burst is None:
                    lane.take(plan)
                else:
                    lane.run(plan, bursts.run)
            lane.drain()
        except BaseException as error:
            self.errors.append(error)
            self.results.put(None)
            raise

    def _bursts(self, rank: int) -> Bursts:
        plans, runner = self._queues[rank], self.runners[rank]
        return Bursts(
            rank,
            self.tp,
            self._page_size,
            runner.execute,
            runner._board,
            plans.waiting,
            lambda news: self.told.extend(news.items),
            PATIENCE_S,
            ahead=partial(self._ahead, rank),
            descriptor=plans.descriptor,
            longest_s=PATIENCE_S,
        )

    def _ahead(self, rank: int, plan: StepPlan) -> StepsAhead | None:
        if self._native is not None and rank not in self._native:
            return None
        found = self.runners[rank].ahead(plan)
        if found is not None:
            self.loops.append(rank)
        return found

    def send(self, plan: StepPlan) -> None:
        for sp_rank in plan.group:
            for tp_rank in range(self.tp):
                self._queues[sp_rank * self.tp + tp_rank].put(plan)

    def receive(self, plan: StepPlan) -> list[Answer]:
        """Wait for all answers to a plan."""
        while len(self._waiting.get(plan.epoch, ())) < len(plan.group) * self.tp:
            answer = self.next_answer()
            self._waiting.setdefault(answer.result.epoch, []).append(answer)
        return self._waiting.pop(plan.epoch)

    def next_answer(self) -> Answer:
        """Wait for whichever rank answers next; raises what a rank raised."""
        answer = self.results.get(timeout=PATIENCE_S)
        if answer is None:
            raise self.errors[0]
        return answer

    def close(self) -> None:
        for plans in self._queues:
            plans.put(None)
        self._threads.join(30.0)
        for plans in self._queues:
            os.close(plans.descriptor)


@dataclass
class Run:
    """What came of driving requests through an engine.

    Attributes:
        logits: by slot, one tensor ``[vocab]`` per sampled token.
        plans, results: everything that was sent and answered, in order.
    """

    logits: dict[int, list[Tensor]]
    plans: list[StepPlan]
    results: list[list[StepResult]]


def drive(engine: ThreadEngine, planner: Planner, requests: Iterable[Request]) -> Run:
    """Plan and run until every request has ended, with up to two turns in flight."""
    planner.add(*requests)
    run = Run({request.slot: [] for request in planner.requests}, [], [])
    flying: list[list[StepPlan]] = []
    overlap = planner.shape.overlap and not planner.shape.elastic
    while any(not request.done for request in planner.requests) or flying:
        turn = planner.plans()
        for plan in turn:
            engine.send(plan)
            run.plans.append(plan)
        if turn:
            flying.append(turn)
        if flying and (len(flying) > overlap or not turn):
            for plan in flying.pop(0):
                answers = engine.receive(plan)
                for answer in answers:
                    for slot, logits_V in answer.logits.items():
                        run.logits[slot].append(logits_V)
                results = [answer.result for answer in answers]
                run.results.append(results)
                planner.acknowledge(plan.epoch, results)
    return run


def one_rank_shape(page_size: int, pages: int) -> Shape:
    """The reference: one rank, whole prompts, one step at a time."""
    return Shape(1, page_size, pages, decode="sharded", overlap=False)

"""A rank's process: load, warm up, say so, then execute plans as they come.

An exception in a step is told to the scheduler (`StepResult.error`) and ends the process with a
nonzero status: ranks of the step's group may have diverged, and nothing here could tell.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.choose import choose_backend, choose_device_backend
from sps_runtime.attention.context import AttentionContext
from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import load_model_config
from sps_runtime.config.parallel import Arch
from sps_runtime.config.process import RankConfig
from sps_runtime.ipc.links import Sender, new_context
from sps_runtime.ipc.memory import map_memory
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.layers.placement import GroupLinks
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.loader import LoadSpec, SharedWeights, load_model, load_model_on
from sps_runtime.ops.cuda_graphs import GraphRecorder
from sps_runtime.ops.dispatch import Ops, choose_ops
from sps_runtime.ops.operators import Operators
from sps_runtime.ops.recording import Recorder, StepRecorder
from sps_runtime.runner.assembly import Setup, open_gpu_means, open_means
from sps_runtime.runner.bursts import Bursts
from sps_runtime.runner.device_board import DeviceBoard
from sps_runtime.runner.gpu import rank_device
from sps_runtime.runner.grammar_masks import open_masks
from sps_runtime.runner.launched import POLL_S, Lane
from sps_runtime.runner.links import Inbox, Teller, open_links
from sps_runtime.runner.measure import measure_decode, measure_flops, measure_link
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.place import Place
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.runner.traced import trace_means, trace_operators
from sps_runtime.runner.warm_up import warm_up
from sps_runtime.sparse.dispatch import device_operators
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.telemetry.timeline import Timeline, open_timeline
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.messages import (
    DecodeCost,
    FromRank,
    LinkCost,
    RankReady,
    Record,
    StopEngine,
    ToRank,
)
from sps_runtime.types.plan import StepPlan

logger = logging.getLogger(__name__)

FAREWELL_MS = 2000


def main() -> None:
    with child_context(RankConfig) as child:
        setup_logging(child.config.log.level, child.config.log.format, child.name)
        run(child)


def run(child: ChildContext[RankConfig]) -> None:
    """Serve until told to stop."""
    config, context = child.config, new_context(message_cores(child.config.engine))
    timeline = open_timeline(config.log.trace_file, config.rank, child.name)
    plans, results = open_links(context, config)
    inbox, teller = Inbox(plans), Teller(context, config.endpoints.frontend)
    try:
        board = TokenBoard(map_memory(child.fds["board"]), config.engine.spin_s)
        runner, ready = start(child, timeline, board)
        results.send(ready)
        child.ready(ready.detail)
        gc.collect()
        gc.freeze()  # what was loaded stays: collections need not look at it again
        bursts = open_bursts(config, runner, board, inbox, teller)
        loop(config.rank, runner, bursts, inbox, results)
    finally:
        teller.close()
        plans.close()
        results.close(FAREWELL_MS)
        context.term()
        timeline.flush()


def message_cores(engine: EngineConfig) -> tuple[int, ...]:
    """Where a bound rank's messages are sent and received: on the cores that ranks leave, or on
    those of all ranks."""
    if not engine.cores:
        return ()
    return tuple(engine.service_cores or sorted({core for cores in engine.cores for core in cores}))


def open_bursts(
    config: RankConfig, runner: ModelRunner, board: TokenBoard, inbox: Inbox, teller: Teller
) -> Bursts:
    """What runs this rank's bursts."""
    engine = config.engine
    return Bursts(
        config.rank,
        engine.parallel.tp_size,
        engine.cache.page_size,
        runner.execute,
        board,
        inbox.waiting,
        teller.tell,
        engine.watchdog_timeout_s,
        ahead=runner.ahead,
        descriptor=inbox.descriptor,
    )


def loop(
    rank: int, runner: ModelRunner, bursts: Bursts, inbox: Inbox, results: Sender[FromRank]
) -> None:
    """Execute plans in the order in which they come, until `StopEngine`."""
    lane = Lane(runner, rank, results.send)
    while not isinstance(message := _next(inbox, lane), StopEngine):
        if isinstance(message, Record):
            runner.record(message.on)
        elif isinstance(message, StepPlan) and message.burst is not None:
            lane.run(message, bursts.run)
        elif isinstance(message, StepPlan):
            lane.take(message)
    lane.drain()


def _next(inbox: Inbox, lane: Lane) -> ToRank:
    """The next message; while steps are on the device whichever comes first, a message or the end
    of the oldest."""
    while lane.busy and not inbox.waiting():
        if not lane.poll():
            time.sleep(POLL_S)
    return inbox.next()


def start(
    child: ChildContext[RankConfig], timeline: Timeline, board: TokenBoard
) -> tuple[ModelRunner, RankReady]:
    """Load this rank's model, meet the others, warm up and measure."""
    config, engine = child.config, child.config.engine
    torch.set_num_threads(engine.threads_per_rank)
    place = Place.of(config.rank, engine.parallel)
    began, device = time.monotonic(), rank_device(engine, config.rank)
    ops = _choose_ops(engine.attention_backend, engine.threads_per_rank, engine.spin_s, device)
    operators = trace_operators(ops.operators, timeline)
    model = _load(child, place, operators, device)
    dtype, vocab = model.dtype, model.config.vocab_size
    backend = _choose_backend(engine, ops, model, dtype, device)
    means = _open_means(child, place, model, dtype, backend, ops, operators, device)
    recorder = _recorder(engine, ops, device, _all_links(means))
    runner = ModelRunner(
        model,
        vocab,
        trace_means(means, timeline),
        board,
        engine.parallel.arch,
        engine.watchdog_timeout_s,
        timeline,
        engine.parallel.pipeline and device.type == "cpu",
        recorder,
        open_masks(engine, model.config),
        DeviceBoard(board.slots, device) if device.type != "cpu" else None,
    )
    cache = engine.cache
    warm_up(runner, place.mesh.sp_size, cache.page_size, cache.pages_per_rank, vocab)
    where = device if device.type != "cpu" else f"{engine.threads_per_rank} threads"
    detail = f"attention {backend.name} ({ops.reason}), {dtype}, {where}"
    ready = RankReady(
        rank=config.rank,
        pages=cache.pages_per_rank,
        link=_measure_link(means),
        decode=_measure_decode(model, means, engine.parallel.arch, recorder),
        flops_per_s=measure_flops(
            model.layers[0].mlp.gate_up, dtype, _all_links(means), means.ops, device
        ),
        no_sparse=no_sparse(means),
        detail=detail,
        bursts=device.type == "cpu",
    )
    logger.info("ready after %.1f s: %s", time.monotonic() - began, detail)
    return runner, ready


def _choose_backend(
    engine: EngineConfig, ops: Ops, model: Decoder, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    head_dim = model.config.head_dim
    if device.type != "cpu":
        choice = engine.attention_backend
        kv_dtype = engine.cache.kv_dtype
        return choose_device_backend(
            choice, device, dtype=dtype, head_dim=head_dim, kv_dtype=kv_dtype
        )
    page_size, threads = engine.cache.page_size, engine.threads_per_rank
    return choose_backend(ops, page_size=page_size, head_dim=head_dim, threads=threads)


def _open_means(
    child: ChildContext[RankConfig],
    place: Place,
    model: Decoder,
    dtype: torch.dtype,
    backend: AttentionBackend,
    ops: Ops,
    operators: Operators,
    device: torch.device,
) -> AttentionContext:
    setup = Setup(child.config, place, model.config, dtype, backend, operators, child.fds)
    if device.type == "cpu":
        return open_means(setup, ops.kernels)
    return open_gpu_means(setup, device, device_operators())


def _recorder(
    engine: EngineConfig, ops: Ops, device: torch.device, links: GroupLinks
) -> StepRecorder | None:
    """What records decode steps. On GPUs those of one SP rank, alone or with TP peers over NCCL:
    among SP ranks which rows see a rank's pages changes from step to step, and so do kernels."""
    if engine.disable_step_graphs:
        return None
    if device.type != "cpu":
        holds = engine.parallel.sp_size == 1 and links.recordable
        return GraphRecorder(device) if holds else None
    return Recorder(ops.kernels) if ops.kernels is not None else None


def no_sparse(means: AttentionContext) -> str:
    """Why a rank cannot choose pages; empty where it can."""
    if means.sparse is None and means.device.type != "cpu":
        return "nothing chooses pages on this GPU, or pages of this KV dtype have no summaries"
    if means.sparse is None:
        return "pages of this size, head or KV dtype have no summaries"
    return ""


def _all_links(means: AttentionContext) -> GroupLinks:
    """The group of all ranks."""
    mesh, group = means.mesh, means.mailroom.group
    return GroupLinks(
        sp=group(mesh.sp_peers(tuple(range(mesh.sp_size)))),
        tp=group(mesh.tp_peers()),
        world=group(tuple(range(mesh.world_size))),
    )


def _measure_link(means: AttentionContext) -> LinkCost:
    links = _all_links(means)
    zero_copy = len(set(means.hosts)) == 1
    return measure_link(links.sp, links.world, zero_copy=zero_copy, device=means.device)


def _measure_decode(
    model: Decoder, means: AttentionContext, arch: Arch, recorder: StepRecorder | None
) -> DecodeCost:
    """Nothing where there is nothing to choose: one SP rank, or cut weights."""
    if means.mesh.sp_size == 1 or arch == "tp":
        return DecodeCost()
    return measure_decode(model, _all_links(means), means.ops, recorder)


def _choose_ops(name: str, threads: int, spin_s: float, device: torch.device) -> Ops:
    """Raises ConfigError for a name that is none, or kernels that cannot be had."""
    if device.type != "cpu":
        return choose_ops("torch" if name == "torch" else "auto", device=device)
    if name not in ("auto", "sps_kernel", "torch"):
        raise ConfigError(f"attention backend {name!r} is none of auto, sps_kernel, torch")
    try:
        ops = choose_ops(name, threads)  # type: ignore[arg-type]
    except ImportError as error:
        raise ConfigError(f"attention backend sps_kernel cannot be imported: {error}") from None
    if ops.kernels is not None and threads > 1:
        ops.kernels.set_pool_spin(spin_s)
    return ops


def _load(
    child: ChildContext[RankConfig], place: Place, ops: Operators, device: torch.device
) -> Decoder:
    """This TP rank's model over the weights that all ranks of the host share, or over a copy of its
    own on its GPU."""
    engine = child.config.engine
    directory = Path(engine.model_path)
    spec = LoadSpec(
        directory,
        engine.dtype,
        engine.load_format,
        engine.seed,
        engine.parallel.tp_size,
        engine.parallel.sp_size,
        engine.quantization,
        Path(engine.weight_cache_dir) if engine.weight_cache_dir else None,
    )
    config = load_model_config(directory)
    if device.type != "cpu":
        return load_model_on(config, spec, place.mesh.tp_rank, device, ops)
    first = min(place.sp_peers_here().values()) - place.mesh.tp_rank
    shared = SharedWeights(child.fds["weights"], first=child.config.rank == first)
    return load_model(config, spec, place.mesh.tp_rank, shared, ops=ops)


if __name__ == "__main__":
    main()

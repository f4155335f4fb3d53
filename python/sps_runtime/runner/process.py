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

from sps_runtime.attention.choose import choose_backend
from sps_runtime.attention.context import AttentionContext
from sps_runtime.config.model import load_model_config
from sps_runtime.config.parallel import Arch
from sps_runtime.config.process import RankConfig
from sps_runtime.ipc.links import Receiver, Sender, new_context
from sps_runtime.ipc.memory import map_memory
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.layers.placement import GroupLinks
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.loader import LoadSpec, SharedWeights, load_model
from sps_runtime.ops.dispatch import Ops, choose_ops
from sps_runtime.ops.operators import Operators
from sps_runtime.ops.recording import Recorder
from sps_runtime.runner.assembly import Place, open_means
from sps_runtime.runner.grammar_masks import open_masks
from sps_runtime.runner.links import open_links
from sps_runtime.runner.measure import measure_decode, measure_flops, measure_link
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.runner.traced import trace_means, trace_operators
from sps_runtime.runner.warm_up import warm_up
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.telemetry.timeline import Timeline, open_timeline
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.messages import DecodeCost, FromRank, LinkCost, RankReady, StopEngine, ToRank
from sps_runtime.types.plan import StepResult

logger = logging.getLogger(__name__)

FAREWELL_MS = 2000


def main() -> None:
    with child_context(RankConfig) as child:
        setup_logging(child.config.log.level, child.config.log.format, child.name)
        run(child)


def run(child: ChildContext[RankConfig]) -> None:
    """Serve until told to stop."""
    config, context = child.config, new_context()
    timeline = open_timeline(config.log.trace_file, config.rank, child.name)
    plans, results = open_links(context, config)
    try:
        runner, ready = start(child, timeline)
        results.send(ready)
        child.ready(ready.detail)
        gc.collect()
        gc.freeze()  # what was loaded stays: collections need not look at it again
        loop(config.rank, runner, plans, results)
    finally:
        plans.close()
        results.close(FAREWELL_MS)
        context.term()
        timeline.flush()


def loop(
    rank: int, runner: ModelRunner, plans: Receiver[ToRank], results: Sender[FromRank]
) -> None:
    """Execute plans in the order in which they come, until `StopEngine`."""
    while not isinstance(message := plans.receive(), StopEngine):
        if message is None:
            continue
        try:
            results.send(runner.execute(message))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            results.send(StepResult(message.epoch, rank, error=reason))
            raise


def start(child: ChildContext[RankConfig], timeline: Timeline) -> tuple[ModelRunner, RankReady]:
    """Load this rank's model, meet the others, warm up and measure."""
    config, engine = child.config, child.config.engine
    torch.set_num_threads(engine.threads_per_rank)
    place = Place.of(config.rank, engine.parallel)
    began = time.monotonic()
    ops = _choose_ops(engine.attention_backend, engine.threads_per_rank, engine.spin_s)
    operators = trace_operators(ops.operators, timeline)
    model = _load(child, place, operators)
    dtype, vocab = model.embedding.weight_VD.dtype, model.config.vocab_size
    backend = choose_backend(
        ops,
        page_size=engine.cache.page_size,
        head_dim=model.config.head_dim,
        threads=engine.threads_per_rank,
    )
    means = open_means(
        config, place, model.config, dtype, backend, operators, child.fds, ops.kernels
    )
    recorder = None
    if ops.kernels is not None and not engine.disable_step_graphs:
        recorder = Recorder(ops.kernels)
    runner = ModelRunner(
        model,
        vocab,
        trace_means(means, timeline),
        TokenBoard(map_memory(child.fds["board"]), engine.spin_s),
        engine.parallel.arch,
        engine.watchdog_timeout_s,
        timeline,
        engine.parallel.pipeline,
        recorder,
        open_masks(engine, model.config),
    )
    cache = engine.cache
    warm_up(runner, place.mesh.sp_size, cache.page_size, cache.pages_per_rank, vocab)
    detail = f"attention {backend.name} ({ops.reason}), {dtype}, {engine.threads_per_rank} threads"
    ready = RankReady(
        rank=config.rank,
        pages=cache.pages_per_rank,
        link=_measure_link(means),
        decode=_measure_decode(model, means, engine.parallel.arch, recorder),
        flops_per_s=measure_flops(model.layers[0].mlp.gate_up, dtype, _all_links(means), means.ops),
        no_sparse=no_sparse(means),
        detail=detail,
    )
    logger.info("ready after %.1f s: %s", time.monotonic() - began, detail)
    return runner, ready


def no_sparse(means: AttentionContext) -> str:
    """Why a rank cannot choose pages; empty where it can."""
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
    return measure_link(links.sp, links.world, zero_copy=len(set(means.hosts)) == 1)


def _measure_decode(
    model: Decoder, means: AttentionContext, arch: Arch, recorder: Recorder | None
) -> DecodeCost:
    """Nothing where there is nothing to choose: one SP rank, or cut weights."""
    if means.mesh.sp_size == 1 or arch == "tp":
        return DecodeCost()
    return measure_decode(model, _all_links(means), means.ops, recorder)


def _choose_ops(name: str, threads: int, spin_s: float) -> Ops:
    """Raises ConfigError for a name that is none, or kernels that cannot be had."""
    if name not in ("auto", "sps_kernel", "torch"):
        raise ConfigError(f"attention backend {name!r} is none of auto, sps_kernel, torch")
    try:
        ops = choose_ops(name, threads)  # type: ignore[arg-type]
    except ImportError as error:
        raise ConfigError(f"attention backend sps_kernel cannot be imported: {error}") from None
    if ops.kernels is not None and threads > 1:
        ops.kernels.set_pool_spin(spin_s)
    return ops


def _load(child: ChildContext[RankConfig], place: Place, ops: Operators) -> Decoder:
    """This TP rank's model over the weights that all ranks of the host share."""
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
    first = min(place.sp_peers_here().values()) - place.mesh.tp_rank
    shared = SharedWeights(child.fds["weights"], first=child.config.rank == first)
    return load_model(load_model_config(directory), spec, place.mesh.tp_rank, shared, ops=ops)


if __name__ == "__main__":
    main()

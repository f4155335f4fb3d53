"""The scheduler's process: wait for all ranks, then loop."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping

import zmq

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import ModelConfig, load_model_config
from sps_runtime.config.process import SchedulerProcessConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.costmodel.strategy import ModelShape
from sps_runtime.ipc.curve import Curve
from sps_runtime.ipc.heartbeat import Heartbeat
from sps_runtime.ipc.links import Receiver, Sender, new_context
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.scheduler.loop import TURN_MS, Links, SchedulerLoop, Watchdog
from sps_runtime.scheduler.scheduler import ModelLimits, Scheduler
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.telemetry.timeline import OTHER_PROCESSES, open_timeline
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.messages import (
    EngineFailed,
    EngineReady,
    FromRank,
    RankReady,
    ToFrontend,
    ToRank,
    ToScheduler,
)

logger = logging.getLogger(__name__)

_ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


def main() -> None:
    with child_context(SchedulerProcessConfig) as child:
        config = child.config
        setup_logging(config.log.level, config.log.format, child.name)
        run(child)


def run(child: ChildContext[SchedulerProcessConfig]) -> None:
    """Schedule until told to stop; whatever ends it otherwise is told to the front end first."""
    config = child.config
    timeline = open_timeline(config.log.trace_file, OTHER_PROCESSES, child.name)
    links = _open_links(config)
    try:
        ready = _wait_for_ranks(links, config.engine)
        model = load_model_config(config.engine.model_path)
        scheduler = make_scheduler(config.engine, model, ready)
        if scheduler.no_sparse and config.engine.attention.mode == "csa":
            logger.warning("attention mode csa runs exact here: %s", scheduler.no_sparse)
        loop = SchedulerLoop(
            scheduler,
            links,
            tp_size=config.engine.parallel.tp_size,
            watchdog=Watchdog(
                config.engine.parallel.world_size,
                config.engine.watchdog_timeout_s,
                time.monotonic,
            ),
            heartbeat=Heartbeat(child.fds["heartbeat"]),
            timeline=timeline,
        )
        cache = config.engine.cache
        links.frontend.send(EngineReady(config.engine.max_total_tokens, cache.page_size))
        child.ready()
        gc.collect()
        gc.freeze()  # what was made so far stays: collections need not look at it again
        loop.run()
    except Exception as error:
        links.frontend.send(EngineFailed(f"{type(error).__name__}: {error}"))
        raise
    finally:
        links.close()
        timeline.flush()


def make_scheduler(
    config: EngineConfig, model: ModelConfig, ready: Mapping[int, RankReady]
) -> Scheduler:
    """The scheduler of an engine whose ranks measured `ready`."""
    costs = measured_costs(config, model, ready)
    limits = ModelLimits(
        context_length=config.context_length,
        eos_ids=frozenset(model.eos_token_ids),
        vocab=model.vocab_size,
    )
    refusals = (ready[rank].no_sparse for rank in sorted(ready))
    no_sparse = next(filter(None, refusals), "")
    bursts = all(rank.bursts for rank in ready.values())
    return Scheduler(
        config.scheduler, config.cache, config.parallel, limits, costs, no_sparse, bursts
    )


def measured_costs(
    config: EngineConfig, model: ModelConfig, ready: Mapping[int, RankReady]
) -> StepCosts:
    """What policies know of costs; the slowest rank's products, because all wait for it."""
    return StepCosts(
        shape=_model_shape(config, model),
        link=ready[0].link,
        flops_per_s=min(rank.flops_per_s for rank in ready.values()),
        decode=ready[0].decode,
    )


def _model_shape(config: EngineConfig, model: ModelConfig) -> ModelShape:
    """What one global rank holds: its TP slice."""
    tp_size = config.parallel.tp_size
    heads, kv_heads = model.heads_per_rank(tp_size), model.kv_heads_per_rank(tp_size)
    attention = model.hidden_size * (2 * heads + 2 * kv_heads) * model.head_dim
    mlp = 3 * model.hidden_size * model.intermediate_size // tp_size
    return ModelShape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        linear_params=model.num_layers * (attention + mlp),
        element_bytes=_ELEMENT_BYTES[config.dtype],
    )


def _open_links(config: SchedulerProcessConfig) -> Links:
    context, endpoints = new_context(), config.endpoints
    keys = endpoints.keys
    curve = Curve.from_text(keys.public, keys.secret, keys.peer) if keys else None
    requests: Receiver[ToScheduler] = Receiver(context, endpoints.scheduler, ToScheduler)
    results: list[Receiver[FromRank]] = [Receiver(context, endpoints.results, FromRank)]
    if endpoints.remote_results:
        results.append(Receiver(context, endpoints.remote_results, FromRank, curve=curve))
    frontend: Sender[ToFrontend] = Sender(context, endpoints.frontend)
    return Links(
        context, requests, results, frontend, [_to_rank(context, e, curve) for e in endpoints.ranks]
    )


def _to_rank(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve | None
) -> Sender[ToRank]:
    """Plans to one rank; the scheduler binds where the rank is on another host."""
    if endpoint.startswith("tcp://"):
        return Sender(context, endpoint, bind=True, curve=curve)
    return Sender(context, endpoint)


def _wait_for_ranks(links: Links, config: EngineConfig) -> dict[int, RankReady]:
    """Wait until every rank is loaded and warm. The supervisor sees those of this host that die.

    Raises:
        ConfigError: when a rank's pool is not what was planned.
        ConnectionError: a rank of another host is gone.
    """
    poller = zmq.Poller()
    for receiver in links.results:
        poller.register(receiver.socket, zmq.POLLIN)
    ready: dict[int, RankReady] = {}
    while len(ready) < config.parallel.world_size:
        poller.poll(TURN_MS)
        links.check()
        for message in links.take_results():
            if isinstance(message, RankReady):
                _check_rank(message, config)
                ready[message.rank] = message
                logger.info("rank %d is ready: %s", message.rank, message.detail)
    return ready


def _check_rank(ready: RankReady, config: EngineConfig) -> None:
    pages = config.cache.pages_per_rank
    if ready.pages != pages:
        raise ConfigError(
            f"rank {ready.rank} has {ready.pages} pages instead of {pages}: start all hosts with "
            "the same settings"
        )


if __name__ == "__main__":
    main()

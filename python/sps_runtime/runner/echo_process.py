"""An echo rank as a real process: a whole server runs on it without a model (``--device echo``).

The "KV" of `runner.echo` lies in the memfds where a real rank's KV would, peers read it in place,
tokens cross by the board; only the mathematics is missing.
"""

from __future__ import annotations

import time

import numpy as np

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import load_model_config
from sps_runtime.config.process import RankConfig
from sps_runtime.distributed.regions import fence_bytes, map_region
from sps_runtime.ipc.links import Receiver, Sender, new_context
from sps_runtime.ipc.memory import map_memory
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.runner.echo import EMPTY, EchoMemory, EchoRank
from sps_runtime.runner.grammar_masks import open_matchers
from sps_runtime.runner.links import open_links
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.types.messages import (
    FromRank,
    LinkCost,
    RankReady,
    StopEngine,
    ToRank,
)
from sps_runtime.types.plan import StepPlan

WAIT_FOR_PEERS_S = 0.001
_BELL_BYTES = 64
_WORD_BYTES = 8


def main() -> None:
    with child_context(RankConfig) as child:
        setup_logging(child.config.log.level, child.config.log.format, child.name)
        run(child)


def run(child: ChildContext[RankConfig]) -> None:
    """Execute plans until told to stop."""
    config, engine = child.config, child.config.engine
    memory = map_echo_memory(child.fds, engine)
    memory.kv[config.rank].fill(EMPTY)
    if config.rank == 0:
        memory.board.fill(EMPTY)
    model = load_model_config(engine.model_path)
    context = new_context()
    plans, results = open_links(context, config)
    ready = RankReady(
        rank=config.rank,
        pages=engine.cache.pages_per_rank,
        link=LinkCost(latency_s=1e-4, bytes_per_s=1e10, zero_copy=True),
        flops_per_s=1e11,
        detail="echo",
    )
    results.send(ready)
    child.ready("echo")
    rank = EchoRank(config.rank, memory, model.vocab_size, open_matchers(engine, model))
    _serve(rank, plans, results, engine.echo_delay_s)
    results.close(linger_ms=200)
    plans.close()
    context.term()


def _serve(
    rank: EchoRank, plans: Receiver[ToRank], results: Sender[FromRank], delay_s: float
) -> None:
    """Take plans and answer them, waiting on peers by short polls."""
    while True:
        message = plans.receive(WAIT_FOR_PEERS_S if rank.busy else None)
        for plan in [message, *plans.take()] if message else plans.take():
            if isinstance(plan, StopEngine):
                return
            if isinstance(plan, StepPlan):
                rank.submit(plan)
        _advance(rank, results, delay_s)


def _advance(rank: EchoRank, results: Sender[FromRank], delay_s: float) -> None:
    """Go on until a peer is waited for or nothing is left."""
    for _ in range(2):  # a plan is written in one poll and read in another
        while (result := rank.poll()) is not None:
            if delay_s:
                time.sleep(delay_s)
            results.send(result)


def map_echo_memory(fds: dict[str, int], engine: EngineConfig) -> EchoMemory:
    """Lay the echo ranks' arrays over the inherited memory."""
    world, cache = engine.parallel.world_size, engine.cache
    shape = (cache.pages_per_rank, cache.page_size)
    size = cache.pages_per_rank * cache.page_size * _WORD_BYTES
    kv = [
        np.frombuffer(map_region(fds[f"kv.{rank}"], size), np.int64).reshape(shape)
        for rank in range(world)
    ]
    fences = np.frombuffer(map_region(fds["fences"], fence_bytes(world)), np.int64)
    return EchoMemory(
        kv=kv,
        board=np.frombuffer(map_memory(fds["board"]), np.int64, offset=_BELL_BYTES),
        fences=fences[:world],
        tp_size=engine.parallel.tp_size,
    )


if __name__ == "__main__":
    main()

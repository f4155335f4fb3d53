"""The processes of one host: ranks, and on node 0 the scheduler; and what they share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.environment import rank_environment, service_environment
from sps_runtime.config.model import ModelConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.process import (
    Endpoints,
    LogConfig,
    RankConfig,
    SchedulerProcessConfig,
)
from sps_runtime.ipc.heartbeat import HEARTBEAT_BYTES, Heartbeat
from sps_runtime.ipc.memory import create_memory
from sps_runtime.ipc.process import Child, spawn
from sps_runtime.ipc.run_dir import RunDir, create_run_dir
from sps_runtime.launch.nodes import first_node_endpoints, local_ranks, other_node_endpoints
from sps_runtime.runner.token_board import board_bytes
from sps_runtime.telemetry import timeline

SCHEDULER_MODULE = "sps_runtime.scheduler.process"
RANK_MODULES = {
    "cpu": "sps_runtime.runner.process",
    "cuda": "sps_runtime.runner.process",
    "echo": "sps_runtime.runner.echo_process",
}


class EngineProcesses:
    """Owns a run directory, the shared memory, and the processes of an engine without HTTP.

    Nothing here has a name outside the run directory; when this process dies, memory goes with the
    last process that maps it.

    Args:
        secret: what the hosts of this engine share, where there are several.

    Attributes:
        run_dir: of the sockets, on node 0; elsewhere None, because links go to node 0.
        endpoints: of all links.
        children: started so far, the scheduler first.
        heartbeat: the scheduler's.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, log: LogConfig, secret: bytes = b""
    ) -> None:
        self.config = config
        self.model = model
        self.log = log
        self.children: list[Child] = []
        if log.trace_file:
            timeline.create(log.trace_file)
        self.run_dir, self.endpoints = _open_run_dir(config.parallel, secret)
        ranks = local_ranks(config.parallel)
        pools = [f"{kind}.{rank}" for kind in ("kv", "summaries") for rank in ranks]
        self._memory = {name: create_memory(name) for name in pools}
        for name in ("fences", "links", "device_links", "weights"):
            self._memory[name] = create_memory(name)
        slots = config.scheduler.max_running_requests
        words = slots + config.parallel.world_size  # `runner.bursts` has one for each rank
        self._memory["board"] = create_memory("board", board_bytes(words))
        self._heartbeat_fd = create_memory("heartbeat", HEARTBEAT_BYTES)
        self.heartbeat = Heartbeat(self._heartbeat_fd)

    def start(self) -> None:
        """Start scheduler and ranks; they report by their status lines when they are ready."""
        if self.run_dir is not None:
            self._start_scheduler(self.run_dir.path)
        for index, rank in enumerate(local_ranks(self.config.parallel)):
            self._start_rank(index, rank)

    def _start_scheduler(self, run_dir: Path) -> None:
        settings = SchedulerProcessConfig(
            engine=self.config,
            endpoints=self.endpoints,
            log=self.log,
        )
        child = spawn(
            SCHEDULER_MODULE,
            settings,
            name="scheduler",
            fds={"heartbeat": self._heartbeat_fd},
            cores=self.config.service_cores,
            removes=run_dir,
            environment=service_environment(),
        )
        self.children.append(child)

    def _start_rank(self, index: int, rank: int) -> None:
        settings = RankConfig(
            rank=rank,
            engine=self.config,
            endpoints=self.endpoints,
            log=self.log,
        )
        module = RANK_MODULES[self.config.device]
        cores = self.config.cores[index] if self.config.cores else ()
        child = spawn(
            module,
            settings,
            name=f"rank-{rank}",
            fds=self._memory,
            cores=cores,
            environment=rank_environment(self.config.threads_per_rank),
        )
        self.children.append(child)

    def kill(self) -> None:
        """SIGKILL what still runs."""
        kill_all(self.children)

    def close(self) -> None:
        """End everything and leave nothing behind."""
        self.kill()
        for child in self.children:
            child.close()
        self.children.clear()
        for descriptor in (*self._memory.values(), self._heartbeat_fd):
            os.close(descriptor)
        self._memory.clear()
        if self.log.trace_file:
            timeline.finish(self.log.trace_file)
        if self.run_dir is not None:
            self.run_dir.remove()


def _open_run_dir(parallel: ParallelConfig, secret: bytes) -> tuple[RunDir | None, Endpoints]:
    if parallel.node_rank > 0:
        return None, other_node_endpoints(parallel, secret)
    run_dir = create_run_dir()
    try:
        return run_dir, first_node_endpoints(parallel, run_dir.path, secret)
    except BaseException:
        run_dir.remove()
        raise


def kill_all(children: Iterable[Child], number: int = signal.SIGKILL) -> None:
    """Signal all children."""
    for child in children:
        child.kill(number)

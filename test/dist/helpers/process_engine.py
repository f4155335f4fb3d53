"""Ranks as real processes over shared memory, with a loop in place of the scheduler."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.parallel import Arch, ParallelConfig
from sps_runtime.config.process import LogConfig, RankConfig, local_endpoints
from sps_runtime.ipc.links import Receiver, Sender, new_context
from sps_runtime.ipc.memory import create_memory
from sps_runtime.ipc.process import Child, spawn
from sps_runtime.ipc.run_dir import create_run_dir
from sps_runtime.runner.token_board import board_bytes
from sps_runtime.types.messages import FromRank, RankReady, StopEngine, ToRank
from sps_runtime.types.plan import StepPlan, StepResult

SLOTS = 256
START_S, STEP_S = 100.0, 100.0


@dataclass
class Answer:
    """One rank's result; logits stay in the processes."""

    result: StepResult

    @property
    def logits(self) -> dict[int, object]:
        return {}


class ProcessEngine:
    """Starts `runner.process` once per rank; `send` and `receive` as `ThreadEngine`'s."""

    def __init__(
        self,
        directory: Path,
        *,
        sp: int = 1,
        tp: int = 1,
        arch: Arch = "ntp",
        page_size: int = 16,
        pages_per_rank: int = 256,
        dtype: str = "float32",
        backend: str = "auto",
    ) -> None:
        config = EngineConfig(
            model_path=str(directory),
            dtype=dtype,  # type: ignore[arg-type]
            attention_backend=backend,
            parallel=ParallelConfig(sp, tp, arch),
            cache=CacheConfig(page_size, pages_per_rank),
            watchdog_timeout_s=STEP_S,
        )
        self.tp, self.world = tp, sp * tp
        self.run_dir = create_run_dir()
        endpoints = local_endpoints(self.run_dir.path, self.world)
        self._context = new_context()
        self._results: Receiver[FromRank] = Receiver(self._context, endpoints.results, FromRank)
        ranks = range(self.world)
        pools = [f"{kind}.{rank}" for kind in ("kv", "summaries") for rank in ranks]
        names = [*pools, "fences", "links", "weights"]
        fds = {name: create_memory(name) for name in names}
        fds["board"] = create_memory("board", board_bytes(SLOTS))
        self.children: list[Child] = []
        for rank in range(self.world):
            rank_config = RankConfig(
                rank=rank,
                engine=config,
                endpoints=endpoints,
                log=LogConfig("warning"),
            )
            environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
            child = spawn(
                "sps_runtime.runner.process",
                rank_config,
                name=f"rank-{rank}",
                fds=fds,
                environment=environment,
            )
            self.children.append(child)
        for descriptor in fds.values():
            os.close(descriptor)
        self._plans: list[Sender[ToRank]] = [
            Sender(self._context, endpoint) for endpoint in endpoints.ranks
        ]
        self._waiting: dict[int, list[Answer]] = {}
        self.ready = self._wait_until_ready()

    def _wait_until_ready(self) -> dict[int, RankReady]:
        ready: dict[int, RankReady] = {}
        try:
            while len(ready) < self.world:
                message = self._next(START_S)
                assert isinstance(message, RankReady)
                ready[message.rank] = message
        except BaseException:
            self.close()
            raise
        return ready

    def _next(self, timeout_s: float) -> FromRank:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self._results.receive(0.5)
            if message is not None:
                return message
            dead = [child.name for child in self.children if child.process.poll() is not None]
            assert not dead, f"{dead} ended"
        raise TimeoutError("ranks do not answer")

    def send(self, plan: StepPlan) -> None:
        for sp_rank in plan.group:
            for tp_rank in range(self.tp):
                self._plans[sp_rank * self.tp + tp_rank].send(plan)

    def receive(self, plan: StepPlan) -> list[Answer]:
        while len(self._waiting.get(plan.epoch, ())) < len(plan.group) * self.tp:
            result = self._next(STEP_S)
            assert isinstance(result, StepResult)
            if result.error is not None:
                raise RuntimeError(f"rank {result.rank}: {result.error}")
            self._waiting.setdefault(result.epoch, []).append(Answer(result))
        return self._waiting.pop(plan.epoch)

    def stop(self) -> list[int]:
        """Let all ranks end in good order; their exit statuses."""
        for sender in self._plans:
            sender.send(StopEngine())
        return [child.process.wait(10.0) for child in self.children]

    def close(self) -> None:
        for child in self.children:
            child.close()
        for sender in self._plans:
            sender.close()
        self._results.close()
        self._context.term()
        self.run_dir.remove()

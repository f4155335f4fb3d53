"""What each kind of child process is started with (`ipc.process.spawn`)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.server import ServerConfig


class Endpoints(msgspec.Struct, frozen=True):
    """ZMQ endpoints of a run. Receivers bind, senders connect.

    Attributes:
        scheduler: frontend -> scheduler.
        frontend: scheduler -> frontend.
        results: ranks -> scheduler.
        ranks: scheduler -> each global rank.
    """

    scheduler: str
    frontend: str
    results: str
    ranks: tuple[str, ...]


def local_endpoints(run_dir: Path, world_size: int) -> Endpoints:
    """Endpoints in a run directory, all on this host."""
    return Endpoints(
        scheduler=f"ipc://{run_dir}/scheduler.ipc",
        frontend=f"ipc://{run_dir}/frontend.ipc",
        results=f"ipc://{run_dir}/results.ipc",
        ranks=tuple(f"ipc://{run_dir}/rank-{rank}.ipc" for rank in range(world_size)),
    )


class LogConfig(msgspec.Struct, frozen=True):
    """How processes log to stderr: ``plain`` or ``json`` lines."""

    level: str = "info"
    format: str = "plain"


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One global rank.

    Inherited descriptors, all memfds and all but the board empty until who knows their shape grows
    them (`distributed.regions.map_region`): ``kv.<global rank>`` of every rank of this host,
    ``board`` (a word per request that may run), ``fences``, ``links``, ``weights``.
    """

    rank: int
    engine: EngineConfig
    endpoints: Endpoints
    run_dir: str
    log: LogConfig = LogConfig()


class SchedulerProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's process. Inherited descriptor: ``heartbeat`` (`ipc.heartbeat`)."""

    engine: EngineConfig
    endpoints: Endpoints
    log: LogConfig = LogConfig()


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP process. Inherited descriptor: ``http``, the bound listening socket."""

    server: ServerConfig
    engine: EngineConfig
    endpoints: Endpoints
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    run_dir: str
    log: LogConfig = LogConfig()

"""What each kind of child process is started with (`ipc.process.spawn`)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.server import ServerConfig


class CurveKeys(msgspec.Struct, frozen=True):
    """Z85 keys of this host's side of links between hosts (`ipc.curve`)."""

    public: str
    secret: str
    peer: str


class Endpoints(msgspec.Struct, frozen=True):
    """ZMQ endpoints of a run. On one host receivers bind and senders connect; between hosts (TCP)
    the scheduler binds both ways.

    Attributes:
        scheduler: frontend -> scheduler.
        frontend: scheduler -> frontend.
        results: ranks of this host -> scheduler.
        ranks: scheduler -> each global rank.
        remote_results: ranks of other hosts -> scheduler, where there are any.
        keys: of TCP endpoints.
    """

    scheduler: str
    frontend: str
    results: str
    ranks: tuple[str, ...]
    remote_results: str = ""
    keys: CurveKeys | None = None


def local_endpoints(run_dir: Path, world_size: int) -> Endpoints:
    """Endpoints in a run directory, all on this host."""
    return Endpoints(
        scheduler=f"ipc://{run_dir}/scheduler",
        frontend=f"ipc://{run_dir}/frontend",
        results=f"ipc://{run_dir}/results",
        ranks=tuple(f"ipc://{run_dir}/rank-{rank}" for rank in range(world_size)),
    )


class LogConfig(msgspec.Struct, frozen=True):
    """How processes tell what they do.

    Attributes:
        level, format: of the log on stderr: ``plain`` or ``json`` lines.
        trace_file: where the timeline goes (`telemetry.timeline`); none where empty.
    """

    level: str = "info"
    format: str = "plain"
    trace_file: str = ""


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One global rank.

    Inherited descriptors, all memfds and all but the board empty until who knows their shape grows
    them (`distributed.regions.map_region`): ``kv.<global rank>`` and ``summaries.<global rank>`` of
    every rank of this host, ``board`` (a word per request that may run), ``fences``, ``links``,
    ``device_links`` (counters of messages between GPUs), ``weights``.
    """

    rank: int
    engine: EngineConfig
    endpoints: Endpoints
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
    log: LogConfig = LogConfig()


class GrammarWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The process that compiles clients' grammars first (`frontend.grammar_worker`).

    Inherited descriptor: ``grammars``, a connected stream socket.

    Attributes:
        backend: its name.
        memory_bytes: addresses that grammars may take beyond what the process needs itself.
        cpu_s: seconds that one grammar may compute; not of the clock, so that what is refused does
            not depend on who else uses the machine.
    """

    backend: str
    tokenizer_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    memory_bytes: int = 512 << 20
    cpu_s: float = 5.0

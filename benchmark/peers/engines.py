"""Engines under test, seen alike: a peer's worker, and our own server over HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness import ROOT, Server, children, tree_pss
from peers.cells import Pair, Side
from peers.install import RECIPES, environment_of, installed, python_of, versions
from peers.protocol import PeerError, Times, Worker, on_cores

BENCHMARK = ROOT / "benchmark"
CALL_S = 900.0
"""Nothing that is asked of a peer may take longer."""
SUPERBLOCKS = 8192
"""Tokens that our pool has besides: superblocks of csa lie whole on a rank."""
COLD_PROMPT = list(range(300, 316))


class Engine(Protocol):
    """What the rounds need of either side."""

    api: str
    versions: dict[str, str]
    cold_start_s: float
    """From starting the process to the first token of a 16-token prompt; files are in memory."""

    @property
    def pid(self) -> int: ...

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


class Peer:
    """A peer in its environment. Raises PeerError when it cannot be started."""

    def __init__(self, side: Side, pair: Pair, model: Path, environments: Path) -> None:
        recipe = RECIPES[side.peer]
        env = environments / side.peer
        if not installed(env):
            raise PeerError(f"{side.peer} is not installed: --install {side.peer}")
        self.versions = {
            name: version
            for name, version in versions(env).items()
            if any(told.startswith(name) for told in (*recipe.packages, recipe.source))
        }
        self._log = environments / f"{side.name}.log"
        command = [str(python_of(env)), "-P", "-m", "peers.worker", recipe.adapter]
        variables = environment_of(side.peer, env, side.threads, BENCHMARK)
        common = {
            "model": str(model),
            "target": str(environments / "models" / f"{model.name}-{recipe.adapter}"),
            "weights": side.weights,
        }
        with on_cores(side.threads):
            converter = Worker(command, variables, self._log)
            try:
                converter.call("prepare", CALL_S, **common)
            finally:
                converter.close()
            self._worker = Worker(command, variables, self._log)
        try:
            self.api: str = self._worker.call("api", 60)
            sizes: dict[str, Any] = {"context": pair.context, "sequences": pair.sequences}
            if side.density:
                sizes["density"] = side.density
            self._worker.call("start", CALL_S, threads=side.threads, **common, **sizes)
            self.generate([COLD_PROMPT], 1)
        except PeerError:
            self._worker.close()
            raise
        self.cold_start_s = time.perf_counter() - self._worker.started

    @property
    def pid(self) -> int:
        return self._worker.pid

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """As `protocol.Adapter.generate`; a continued process first gets a moment to wake."""
        self._worker.resume()
        times: Times = self._worker.call("generate", CALL_S, prompts=prompts, new_tokens=new_tokens)
        return times

    def pause(self) -> None:
        self._worker.pause()

    def close(self) -> None:
        self._worker.close()


class Ours:
    """Our server, started by its command line and asked over HTTP. It is never paused."""

    api = "HTTP"

    def __init__(self, side: Side, pair: Pair, model: Path) -> None:
        self.versions: dict[str, str] = {}
        room = str(pair.context + 64 * pair.sequences)
        pool = str(int(room) + SUPERBLOCKS)
        flags = ["--model-path", str(model), "--max-total-tokens", pool, "--context-length", room]
        flags += ["--cpu-bind", cores_of(side)]  # also where the other side is a server of ours
        self._server = Server(*flags, *side.flags)
        with on_cores(side.threads):
            self._server.__enter__()
        try:
            self.generate([COLD_PROMPT], 1)
        except BaseException:
            self.close()
            raise
        self.cold_start_s = time.perf_counter() - self._server.started

    @property
    def pid(self) -> int:
        return int(self._server.process.pid)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        try:
            streams = self._server.streams([list(prompt) for prompt in prompts], new_tokens)
        except (RuntimeError, OSError) as error:
            raise PeerError(f"our server: {error}") from error
        return [stream.times for stream in streams]

    def pause(self) -> None:
        """Idle ranks sleep; what they still take is in each row as `other_cpu_s`."""

    def close(self) -> None:
        self._server.__exit__()


def cores_of(side: Side) -> str:
    """For each rank of a side its share of the cores that `on_cores` leaves it."""
    ranks = int(side.flags[side.flags.index("--sp-size") + 1])
    cores = sorted(os.sched_getaffinity(0))[: side.threads]
    each = max(1, len(cores) // ranks)
    shares = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def offers(flag: str) -> bool:
    """Whether our command line knows a flag."""
    command = [sys.executable, "-m", "sps_runtime.launch_server", "--help"]
    path = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    return flag in shown.stdout


def start(side: Side, pair: Pair, model: Path, environments: Path) -> Engine:
    """Start one side. Raises PeerError, saying why, when that cannot be."""
    if side.peer:
        return Peer(side, pair, model, environments)
    missing = [flag for flag in side.flags if flag.startswith("--") and not offers(flag)]
    if missing:
        raise PeerError(f"our server does not know {' '.join(missing)} yet")
    try:
        return Ours(side, pair, model)
    except (RuntimeError, TimeoutError) as error:
        raise PeerError(f"our server: {error}") from error


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants so far."""
    total = 0.0
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / 100
    return total + sum(cpu_seconds(child) for child in children(pid))


@contextlib.contextmanager
def watched(engine: Engine, result: dict[str, Any]) -> Iterator[None]:
    """Sample the PSS of a process tree every 0.2 s; the peak goes to `result`."""
    stop = threading.Event()
    result["peak_pss_bytes"] = 0

    def sample() -> None:
        while not stop.wait(0.2):
            result["peak_pss_bytes"] = max(result["peak_pss_bytes"], tree_pss(engine.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()

"""How the benchmark drives an engine in another environment: one JSON object a line, both ways.

A request is `{"do": NAME, ...arguments}`; a reply is `{"ok": RESULT}` or `{"error": TEXT}`. The
peer's own prints go to stderr (a log file), so only replies are on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

Times = list[list[float]]
"""For each prompt the arrival time of each of its tokens, in seconds since all were sent."""


class PeerError(RuntimeError):
    """The peer failed, died or did not answer in time; the message says which and why."""


class Adapter(Protocol):
    """What every engine under test can do. Raises anything on failure."""

    API: str
    """'in process' or 'HTTP'"""

    def prepare(self, model: str, target: str, weights: str) -> None:
        """Convert the Hugging Face directory `model` to `target`, once (no-op if none needed)."""

    def start(
        self, model: str, target: str, weights: str, threads: int, context: int, sequences: int
    ) -> None:
        """Load the model for `sequences` at once with `context` tokens of KV in all. What prefills
        sparsely takes `density`, the share of causal pairs that it is to keep."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Decode greedily, EOS ignored, no prefix cache; all prompts are sent at once."""

    def stop(self) -> None:
        """Free what `start` took."""


class Worker:
    """An adapter in its own process: `start` it, `call` it, `close` it.

    It has a process group, so that all of it can be stopped and ended, but no session of its own:
    the scheduler of Linux shares processors out by session, and would treat it unlike ours.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log: Path | None = None
    ) -> None:
        self.started = time.perf_counter()
        self._log: IO[bytes] | None = log.open("ab") if log else None
        self.process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log or subprocess.DEVNULL,
            process_group=0,
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, name: str, timeout_s: float, **arguments: Any) -> Any:
        """Run one method of the adapter and return its result."""
        self.resume()
        assert self.process.stdin is not None
        line = json.dumps({"do": name, **arguments}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{name}: the peer ended with {self.process.wait(5)}") from None
        reply = json.loads(self._line(name, time.monotonic() + timeout_s))
        if "error" in reply:
            raise PeerError(f"{name}: {reply['error']}")
        return reply["ok"]

    def _line(self, name: str, deadline: float) -> bytes:
        """One line of the peer's stdout; select, for a pipe's readline knows no timeout."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise PeerError(f"{name}: no answer in time")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise PeerError(f"{name}: the peer ended with {self.process.wait(5)}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def pause(self) -> None:
        """Stop the whole process group, so that it takes nothing from who is being measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Stop the adapter, then end whatever is left of its process group."""
        with contextlib.suppress(PeerError, ValueError):
            if self.process.poll() is None:
                self.call("stop", 20)
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@contextlib.contextmanager
def on_cores(cores: int) -> Iterator[None]:
    """Processes started in the body stay on the first `cores` of this process's cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

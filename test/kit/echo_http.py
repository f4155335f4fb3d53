"""A whole server over echo ranks as a subprocess: the real command line, the real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx

from test.kit.echo_engine import CONFIG, children_of
from test.kit.tokenizers import byte_level_tokenizer, write_directory

ROOT = Path(__file__).parents[2]
EOS = 2


def write_model(directory: Path) -> Path:
    """A model directory with a tokenizer, enough for a server over echo ranks."""
    tokenizer = byte_level_tokenizer()
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": EOS}
    write_directory(directory, tokenizer, eos_token="<|im_end|>")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EchoHttp:
    """Starts ``python -m sps_runtime.launch_server`` in a temporary directory of its own.

    Args:
        model: the model's directory.
        arguments: of the command line, in addition.
        device: of the ranks.

    Attributes:
        url: where it serves.
        temporary: its TMPDIR: what is left there when it has ended is a leak.
    """

    def __init__(self, model: Path, *arguments: str, device: str = "echo") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="t")
        self.temporary = Path(self._directory.name)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.temporary.parent / f"{self.temporary.name}.log"
        command = [sys.executable, "-m", "sps_runtime.launch_server", "--device", device]
        command += ["--model-path", str(model), "--port", str(self.port), *arguments]
        path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONPATH": path},
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> EchoHttp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._directory.cleanup()
        self.log.unlink(missing_ok=True)

    def wait_ready(self, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def children(self) -> dict[str, int]:
        """Process ids by the names that the launcher gave them. One that is just being started
        still shows the launcher's own arguments, and has no name."""
        found = {}
        for pid in children_of(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            boot = b"".join(words[-2:])
            if boot.startswith(b"{"):
                found[str(json.loads(boot)["name"])] = pid
        return found

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 15.0) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def generate(self, text: str, max_new_tokens: int) -> httpx.Response:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"text": text, "sampling_params": sampling}
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)


class Stream(threading.Thread):
    """A client that reads a stream to its end, whatever that is.

    Attributes:
        tokens: how many came.
        last_event: the last JSON event.
        done: whether [DONE] came.
        outcome: "finished", "error event", or "closed" (the connection just ended).
        ended: when, by the monotonic clock.
    """

    def __init__(self, server: EchoHttp, max_new_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/generate"
        self._wanted = max_new_tokens
        self.tokens = 0
        self.last_event: dict[str, object] = {}
        self.done = False
        self.outcome = "running"
        self.ended = 0.0
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        sampling = {"max_new_tokens": self._wanted, "temperature": 0, "ignore_eos": True}
        body = {"text": "a stream", "sampling_params": sampling, "stream": True}
        try:
            with httpx.stream("POST", self._url, json=body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                for event in self._events(response.iter_lines()):
                    self._take(event)
        except httpx.TransportError:
            self.outcome = "closed"
        else:
            failed = "error" in self.last_event
            self.outcome = "error event" if failed else "finished" if self.done else "closed"
        self.ended = time.monotonic()
        self.started.set()

    def _events(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            if line.startswith("data: "):
                yield line.removeprefix("data: ")

    def _take(self, event: str) -> None:
        if event == "[DONE]":
            self.done = True
            return
        self.last_event = json.loads(event)
        meta = self.last_event.get("meta_info")
        if isinstance(meta, dict):
            self.tokens = meta["completion_tokens"]
            self.started.set()

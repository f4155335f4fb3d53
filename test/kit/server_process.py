"""A whole server as its user starts it, over echo ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from test.kit import tokenizers as kinds
from test.kit.echo_engine import CONFIG

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 400
EOS = 2


def write_echo_model(directory: Path) -> Path:
    """A directory with what a server over echo ranks reads: a tokenizer and a config.json."""
    kinds.write_directory(directory, kinds.byte_level_tokenizer(), eos_token="<|im_end|>")
    config = {**CONFIG, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class ServerProcess:
    """``python -m sps_runtime.launch_server`` on a free port; a context manager that ends it.

    Args:
        directory: the model's.
        flags: further flags.
        ready_s: how long the start may take.
    """

    def __init__(self, directory: Path, flags: Sequence[str] = (), *, ready_s: float = 30) -> None:
        command = [sys.executable, "-m", "sps_runtime.launch_server"]
        command += ["--model-path", str(directory), "--device", "echo", "--port", "0", *flags]
        self._ready_s = ready_s
        self._command = command
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()

    def __enter__(self) -> ServerProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
        self.process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if not self._ready.wait(self._ready_s) or not self.url:
            self._end()
            raise AssertionError("not ready:\n" + "".join(self.log))
        return self

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"ready after .*(http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def terminate(self) -> int:
        """Ask it to end as a process manager would; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self._reader.join(5)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if error is not None:
            print("".join(self.log[-30:]))

    def child(self, name: str) -> int:
        """The process id of the child that logs under `name`."""
        for path in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (path / "children").read_text().split():
                if f'"name":"{name}"' in Path(f"/proc/{pid}/cmdline").read_text():
                    return int(pid)
        raise AssertionError(f"no child called {name}")


def wait_until_gone(pids: Sequence[int], timeout_s: float) -> float:
    """Wait until none of `pids` exists; the seconds it took."""
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - began < timeout_s, f"still there after {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - began

"""Two "hosts" on one machine: network namespaces with mount namespaces and runtime directories.

Nothing local can carry a message between them: each has its own loopback and abstract sockets (the
network namespace), its own temporary directory (a tmpfs that only it sees), and processes inherit
no descriptors. One veth pair joins them. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def available() -> str:
    """Return why hosts cannot be made here, or nothing when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "iproute2 and unshare are needed"
    probe = f"sps-probe-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class TwoHosts:
    """A context manager: two namespaces, one link, processes inside them.

    Args:
        folder: where runtime directories' mount points are made.
    """

    def __init__(self, folder: Path) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = (f"sps-a-{tag}", f"sps-b-{tag}")
        self._links = (f"va{tag}", f"vb{tag}")
        self._folders = (folder / "run-a", folder / "run-b")
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoHosts:
        for name in self.names:
            _ip("netns", "add", name)
        ends = zip(self.names, self._links, strict=True)
        (left, left_link), (right, right_link) = ends
        pair = ("type", "veth", "peer", "name", right_link, "netns", right)
        _ip("link", "add", left_link, "netns", left, *pair)
        for name, link, address in zip(self.names, self._links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        for folder in self._folders:
            folder.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(
        self, host: int, *command: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, its temporary directory a tmpfs that only it can see."""
        folder = self._folders[host]
        script = 'mount -t tmpfs tmpfs "$TMPDIR" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *inside, *command],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {}), "TMPDIR": str(folder)},
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def run_python(self, host: int, script: str, timeout: float) -> str:
        """Run a Python script on a host and return what it printed."""
        command = ["ip", "netns", "exec", self.names[host], sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

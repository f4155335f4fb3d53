"""Two "hosts" on one machine: network namespaces with mount namespaces and runtime directories.

Nothing local can carry a message between them: each has its own loopback and abstract sockets (the
network namespace), its own temporary directory (a tmpfs that only it sees), and processes inherit
no descriptors. One veth pair joins them. Needs root and iproute2.
"""

from __future__ import annotations

import json
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

    def congestion_control(self, name: str) -> None:
        """What TCP connections of both hosts use from now on."""
        for host in self.names:
            setting = f"net.ipv4.tcp_congestion_control={name}"
            subprocess.run(["ip", "netns", "exec", host, "sysctl", "-qw", setting], check=True)

    def shape(self, mbit: float) -> None:
        """Let each end send so many megabits a second, headers included; 0 for no limit."""
        for name, link in zip(self.names, self._links, strict=True):
            tc = ["tc", "-n", name, "qdisc"]
            subprocess.run([*tc, "del", "dev", link, "root"], capture_output=True)
            if mbit:
                rate = ["tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms"]
                subprocess.run([*tc, "add", "dev", link, "root", *rate], check=True)

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes that each end has sent since `shape` was called with a limit, headers included."""
        sent = []
        for name, link in zip(self.names, self._links, strict=True):
            show = ["tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", link]
            found = json.loads(subprocess.run(show, check=True, capture_output=True).stdout)
            sent.append(int(found[0]["bytes"]))
        return sent[0], sent[1]

    def start(
        self,
        host: int,
        *command: str,
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, its temporary directory a tmpfs that only it can see; where
        `piped`, its input and output are the caller's."""
        folder = self._folders[host]
        script = 'mount -t tmpfs tmpfs "$TMPDIR" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *inside, *command],
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else None,
            env={**os.environ, **(environment or {}), "TMPDIR": str(folder)},
            process_group=0,
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

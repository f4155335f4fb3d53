"""Start child processes, and see both ways when one dies.

A child is ``python -m MODULE`` with its configuration as JSON in an anonymous file and further
descriptors by name; `multiprocessing` is not used, because its transport is pickle. Death is seen
from both sides: the parent polls a pidfd, the child gets a signal (PR_SET_PDEATHSIG) and reads EOF
on a pipe that only the parent holds open.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from sps_runtime.ipc.run_dir import remove_run_dir
from sps_runtime.types.errors import ConfigError

C = TypeVar("C")
logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

DRAIN_SIGNAL = signal.SIGUSR2
"""How a parent tells a child to finish what it has and end. Not SIGTERM: a service manager sends
that to every process of the group, and one wish must not arrive twice."""


class ChildReady(msgspec.Struct, frozen=True, tag="ready"):
    """The child can do its work."""

    detail: str = ""


class ChildFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The child ends; `message` is one line that says why."""

    message: str


ChildStatus = ChildReady | ChildFailed
_status_decoder: msgspec.json.Decoder[ChildStatus] = msgspec.json.Decoder(ChildStatus)


# ---------------------------------------------------------------------------------- the parent


@dataclass(eq=False)
class Child:
    """A started child as its parent sees it.

    Attributes:
        name: for logs, such as ``rank-0``.
        process: the subprocess.
        pidfd: readable when the process has ended.
        status_fd: non-blocking; readable when a status line is here.
    """

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    status_fd: int
    _alive_fd: int
    _pending: bytearray = field(default_factory=bytearray)

    def read_status(self) -> list[ChildStatus]:
        """Return the status lines that are here; empty at EOF or when there are none."""
        try:
            while chunk := os.read(self.status_fd, 65536):
                self._pending += chunk
        except BlockingIOError:
            pass
        *lines, rest = bytes(self._pending).split(b"\n")
        self._pending = bytearray(rest)
        return [_status_decoder.decode(line) for line in lines]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; quiet when the process is gone."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Kill the child if it lives, wait for it, close all descriptors."""
        self.kill()
        self.process.wait()
        for descriptor in (self.pidfd, self.status_fd, self._alive_fd):
            os.close(descriptor)


def spawn(
    module: str,
    config: msgspec.Struct,
    *,
    name: str,
    fds: Mapping[str, int] | None = None,
    cores: Sequence[int] = (),
    removes: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start ``python -m module``.

    Args:
        config: what `child_context` of the child returns.
        name: for logs and the process list.
        fds: further descriptors, inherited under these names (they stay open here).
        cores: logical CPUs that the child binds itself to before it imports anything heavy.
        removes: run directory that the child removes when it sees that this process has died; such
            a child gets no death signal, it sees EOF.
        environment: all of the child's variables; this process's unless told.

    The death signal fires when the *thread* that forked ends, so it is asked for only when this is
    the main thread; elsewhere the pipe alone tells the child.
    """
    config_fd = os.memfd_create("sps-config", os.MFD_CLOEXEC)
    os.write(config_fd, msgspec.json.encode(config))
    os.lseek(config_fd, 0, os.SEEK_SET)
    alive_read, alive_write = os.pipe()
    status_read, status_write = os.pipe()
    os.set_blocking(status_read, False)
    named = {"config": config_fd, "alive": alive_read, "status": status_write, **(fds or {})}
    in_main = threading.current_thread() is threading.main_thread()
    boot = _Boot(
        name=name,
        parent=os.getpid(),
        death_signal=in_main and removes is None,
        removes=str(removes or ""),
        cores=tuple(cores),
        fds=named,
    )
    # -P: a file of the working directory must not stand in for a library.
    command = [sys.executable, "-P", "-m", module, msgspec.json.encode(boot).decode()]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(named.values()),
            env=environment,
        )
    except BaseException:
        os.close(alive_write)
        os.close(status_read)
        raise
    finally:
        for descriptor in (config_fd, alive_read, status_write):
            os.close(descriptor)
    return Child(name, process, os.pidfd_open(process.pid), status_read, alive_write)


# ----------------------------------------------------------------------------------- the child


class _Boot(msgspec.Struct, frozen=True):
    """The child's one argument: no secrets, it can be read in the process list."""

    name: str
    parent: int
    death_signal: bool
    removes: str
    cores: tuple[int, ...]
    fds: dict[str, int]


class ChildContext(Generic[C]):
    """What a child got from its parent, and how it answers.

    Attributes:
        name: this process's name.
        config: the configuration.
        fds: inherited descriptors by name.
    """

    def __init__(self, boot: _Boot, config: C) -> None:
        self.name = boot.name
        self.config = config
        own = ("config", "alive", "status")
        self.fds = {name: fd for name, fd in boot.fds.items() if name not in own}
        self._status_fd = boot.fds["status"]

    def ready(self, detail: str = "") -> None:
        """Tell the parent that this process can do its work."""
        self._report(ChildReady(detail))

    def failed(self, message: str) -> None:
        """Tell the parent why this process is about to end."""
        self._report(ChildFailed(" ".join(message.split())))

    def _report(self, status: ChildStatus) -> None:
        try:
            os.write(self._status_fd, msgspec.json.encode(status) + b"\n")
        except OSError:
            logger.debug("the parent does not listen any more")


def _orphaned(boot: _Boot) -> NoReturn:
    """The parent is dead: leave nothing behind, and end."""
    if boot.removes:
        remove_run_dir(Path(boot.removes))
    os._exit(1)


def _watch_parent(boot: _Boot) -> None:
    """Return never: the pipe says nothing until the parent is dead."""
    while os.read(boot.fds["alive"], 1):
        pass
    _orphaned(boot)


@contextmanager
def child_context(config_type: type[C]) -> Iterator[ChildContext[C]]:
    """Take over what `spawn` sent. Call it first, in the main thread.

    SIGUSR1 prints the stacks of all threads. SIGINT and SIGTERM are ignored: they reach the whole
    group, and the parent decides. Any exception is reported to the parent as one line and ends the
    process with status 1.
    """
    arguments = sys.argv[1:]
    if len(arguments) != 1:
        raise SystemExit("this module is started by the launcher; run sps_runtime.launch_server")
    boot = msgspec.json.decode(arguments[0], type=_Boot)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if boot.death_signal:
        _set_death_signal(signal.SIGKILL)
    if os.getppid() != boot.parent:
        _orphaned(boot)
    if boot.cores:
        os.sched_setaffinity(0, boot.cores)
    for descriptor in boot.fds.values():
        os.set_inheritable(descriptor, False)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with open(boot.fds["config"], "rb") as file:
        raw = file.read()
    child = ChildContext(boot, msgspec.json.decode(raw, type=config_type))
    threading.Thread(target=_watch_parent, args=(boot,), name="parent-watch", daemon=True).start()
    try:
        yield child
    except ConfigError as error:
        child.failed(str(error))
        raise SystemExit(1) from None
    except Exception as error:
        logger.exception("%s ends", boot.name)
        child.failed(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _set_death_signal(number: int) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

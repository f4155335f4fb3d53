"""The private directory that holds one run's sockets."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

PREFIX = "spsr-"
_MAX_SOCKET_PATH = 107  # sun_path, without its closing zero


@dataclass(frozen=True)
class RunDir:
    """A run's directory, and the lock that shows others that the run lives.

    A lock and not a process id: two containers may share a /tmp and not their process ids.
    """

    path: Path
    lock_fd: int

    def remove(self) -> None:
        """Remove the directory and let go of its lock."""
        remove_run_dir(self.path)
        os.close(self.lock_fd)


def create_run_dir(parent: str | None = None) -> RunDir:
    """Make ``spsr-<128 random bits>``, mode 0700, and sweep what dead runs left beside it.

    Raises:
        OSError: when the directory cannot be made, or its path leaves no room for a socket name.
    """
    base = Path(parent or tempfile.gettempdir())
    sweep(base)
    name = secrets.token_urlsafe(16)
    path = base / f"{PREFIX}{name}"
    if len(os.fsencode(path / "rank-1000")) > _MAX_SOCKET_PATH:
        raise OSError(f"{base} is too long a path for sockets; set TMPDIR to a shorter one")
    fresh = base / f"new-{PREFIX}{name}"  # renamed once locked, so that no sweep takes it for dead
    fresh.mkdir(mode=0o700)
    lock_fd = os.open(fresh / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    fresh.rename(path)
    return RunDir(path, lock_fd)


def remove_run_dir(path: Path) -> None:
    """Remove a run directory; quiet when it is gone already."""
    if path.name.startswith(PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def sweep(base: Path) -> None:
    """Remove run directories of this user whose run is dead (nobody holds their lock)."""
    for path in base.glob(f"{PREFIX}*"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            remove_run_dir(path)
        finally:
            os.close(lock_fd)

"""Run directories: private, removed, swept only when their run is dead."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sps_runtime.ipc.memory import create_memory, map_memory
from sps_runtime.ipc.run_dir import create_run_dir


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short path: pytest's own leaves no room for a socket's name."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_private_and_removed(tmp_path: Path) -> None:
    run = create_run_dir(str(tmp_path))
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    (run.path / "x.ipc").touch()
    run.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_swept_and_the_living_are_not(tmp_path: Path) -> None:
    living = create_run_dir(str(tmp_path))
    dead = create_run_dir(str(tmp_path))
    os.close(dead.lock_fd)
    third = create_run_dir(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([living.path, third.path])
    living.remove()
    third.remove()


def test_a_path_without_room_for_sockets_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    with pytest.raises(OSError, match="TMPDIR"):
        create_run_dir(str(deep))


def test_memory_is_shared_zeroed_and_sealed() -> None:
    descriptor = create_memory("test", 8192)
    one, other = map_memory(descriptor), map_memory(descriptor)
    assert len(one) == 8192 and one[:] == bytes(8192)
    one[100] = 7
    assert other[100] == 7
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(descriptor, 4096)
    one.close()
    other.close()
    os.close(descriptor)

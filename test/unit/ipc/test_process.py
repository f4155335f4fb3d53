"""Children: configuration, descriptors, status lines, and death on both sides."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sps_runtime.ipc.process import Child, ChildFailed, ChildReady, ChildStatus, spawn

HERE = Path(__file__).parent
CHILD_PATH = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
}


class ChildConfig(msgspec.Struct):
    do: str


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.close()


def start(children: list[Child], do: str, **options: object) -> Child:
    child = spawn(
        "child_program",
        ChildConfig(do),
        name=f"test-{do}",
        environment=CHILD_PATH,
        **options,  # type: ignore[arg-type]
    )
    children.append(child)
    return child


def wait_status(child: Child, timeout: float = 10.0) -> ChildStatus:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if lines := child.read_status():
            return lines[0]
        select.select([child.status_fd], [], [], 0.1)
    raise AssertionError("no status line")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while alive(pid):
        assert time.monotonic() < end, f"process {pid} still lives"
        time.sleep(0.005)


def test_config_descriptors_and_cores_reach_the_child(children: list[Child]) -> None:
    text = os.memfd_create("text")
    os.write(text, b"hello")
    core = min(os.sched_getaffinity(0))
    child = start(children, "echo", fds={"text": text}, cores=[core])
    os.close(text)
    assert wait_status(child) == ChildReady(f"test-echo hello [{core}]")
    assert child.process.wait(10) == 0


@pytest.mark.parametrize(
    ("do", "message"), [("refuse", "no such thing"), ("break", "ZeroDivisionError: oh")]
)
def test_failures_are_reported_as_one_line(children: list[Child], do: str, message: str) -> None:
    child = start(children, do)
    assert wait_status(child) == ChildFailed(message)
    assert child.process.wait(10) == 1


def test_the_parent_sees_a_death_at_once(children: list[Child]) -> None:
    child = start(children, "sleep")
    wait_status(child)
    os.kill(child.process.pid, signal.SIGKILL)
    assert select.select([child.pidfd], [], [], 5.0)[0]


def test_children_end_with_a_killed_parent(children: list[Child]) -> None:
    parent = start(children, "parent")
    status = wait_status(parent)
    assert isinstance(status, ChildReady)
    os.kill(parent.process.pid, signal.SIGKILL)
    parent.process.wait(5)
    wait_gone(int(status.detail), timeout=1.0)


def test_a_child_outlives_the_thread_that_started_it(children: list[Child]) -> None:
    thread = threading.Thread(target=start, args=(children, "sleep"))
    thread.start()
    thread.join()
    wait_status(children[0])
    time.sleep(0.2)
    assert children[0].process.poll() is None


def test_nothing_is_started_by_hand(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "child_program"],
        env=CHILD_PATH,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "launch_server" in done.stderr

"""One process dies: everyone who waits is answered, everything ends, nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from test.kit.echo_engine import alive, eventually, shm_files
from test.kit.echo_http import EchoHttp, Stream, free_port, write_model

TREE_GONE_S = 5.0
ANSWERED_S = 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model: Path) -> Iterator[EchoHttp]:
    arguments = ("--sp-size", "2", "--echo-delay", "0.01", "--page-size", "16")
    before = shm_files()
    with EchoHttp(model, *arguments) as running:
        running.wait_ready()
        yield running
        assert shm_files() <= before, "something is left in /dev/shm"


def assert_all_gone(server: EchoHttp, pids: list[int], began: float) -> None:
    left = TREE_GONE_S - (time.monotonic() - began)
    eventually(lambda: not any(map(alive, pids)), left, "the tree is gone")
    eventually(lambda: not list(server.temporary.iterdir()), 1.0, "the run directory is gone")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("victim", ["scheduler", "rank-0", "rank-1", "http"])
def test_a_killed_child_ends_the_server(server: EchoHttp, victim: str, busy: bool) -> None:
    children = server.children()
    assert sorted(children) == ["http", "rank-0", "rank-1", "scheduler"]
    streams = [Stream(server, 50_000) for _ in range(4)] if busy else []
    for stream in streams:
        assert stream.started.wait(10)
    began = time.monotonic()
    os.kill(children[victim], signal.SIGKILL)
    for stream in streams:
        stream.join(ANSWERED_S)
        assert stream.outcome == ("closed" if victim == "http" else "error event")
    assert server.process.wait(TREE_GONE_S) == 1
    assert_all_gone(server, [*children.values()], began)
    assert f"{victim} was ended by SIGKILL" in server.log.read_text()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_children_end_with_a_killed_supervisor(server: EchoHttp, busy: bool) -> None:
    children = server.children()
    streams = [Stream(server, 50_000) for _ in range(2)] if busy else []
    for stream in streams:
        assert stream.started.wait(10)
    began = time.monotonic()
    server.process.kill()
    server.process.wait()
    assert_all_gone(server, [*children.values()], began)
    for stream in streams:
        stream.join(ANSWERED_S)
        assert not stream.is_alive()
    with EchoHttp(server_model(server)) as again:  # nothing of the old run is in its way
        again.wait_ready()
        assert again.generate("again", 5).status_code == 200


def server_model(server: EchoHttp) -> Path:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(arguments[arguments.index("--model-path") + 1])


@pytest.mark.parametrize("victim", ["scheduler", "rank-1"])
def test_a_process_that_hangs_ends_the_server(model: Path, victim: str) -> None:
    arguments = ("--sp-size", "2", "--watchdog-timeout", "1", "--echo-delay", "0.01")
    with EchoHttp(model, *arguments) as server:
        server.wait_ready()
        children = server.children()
        streams = [Stream(server, 50_000) for _ in range(8)]
        for stream in streams:
            assert stream.started.wait(10)
        began = time.monotonic()
        os.kill(children[victim], signal.SIGSTOP)
        for stream in streams:
            stream.join(6.0)
            assert stream.outcome == "error event"
        assert server.process.wait(TREE_GONE_S) == 1
        assert_all_gone(server, [*children.values()], began + 1.0)


def test_sigterm_to_the_whole_group_drains(server: EchoHttp) -> None:
    """As service managers do: every process gets the signal, and still everyone is served."""
    children = server.children()
    streams = [Stream(server, 60) for _ in range(8)]
    for stream in streams:
        assert stream.started.wait(10)
    os.killpg(server.process.pid, signal.SIGTERM)
    time.sleep(0.2)
    refused = server.generate("too late", 5)
    assert refused.status_code == 503
    for stream in streams:
        stream.join(10)
        assert (stream.outcome, stream.tokens) == ("finished", 60)
    began = time.monotonic()
    assert server.process.wait(TREE_GONE_S) == 0
    assert_all_gone(server, [*children.values()], began)


def test_a_second_sigterm_ends_at_once(server: EchoHttp) -> None:
    children = server.children()
    stream = Stream(server, 50_000)
    assert stream.started.wait(10)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert server.process.poll() is None
    began = time.monotonic()
    assert server.end(signal.SIGTERM, timeout_s=2.0) == 128 + signal.SIGTERM
    assert_all_gone(server, [*children.values()], began)


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.5, 0.8, 2.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_early_leaves_nothing(model: Path, after_s: float, number: int) -> None:
    with EchoHttp(model, "--sp-size", "2") as server:
        time.sleep(after_s)
        children = list(server.children().values())
        began = time.monotonic()
        status = server.end(number, timeout_s=TREE_GONE_S)
        drained = "stopped" in server.log.read_text()  # a fast machine was ready: SIGTERM drains
        assert (status == 0) == (drained and number == signal.SIGTERM)
        assert_all_gone(server, children, began)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/no/such/model"], "does not exist"),
        (["--tp-size", "3"], "tp_size 3 does not divide"),
        (["--sp-size", "0"], "sp_size must be at least 1"),
        (["--quantization", "fp8"], "invalid choice: 'fp8'"),
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--policy", "no-such-policy"], "no-such-policy"),
    ],
)
def test_what_cannot_be_started_says_so_at_once(
    model: Path, arguments: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "sps_runtime.launch_server", "--device", "echo"]
    command += ["--model-path", str(model), "--port", str(free_port()), *arguments]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert time.monotonic() - began < 2.5
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_says_so_before_anything_starts(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "sps_runtime.launch_server", "--port", str(port)]
        command += ["--device", "echo", "--model-path", str(model)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert time.monotonic() - began < 2.0
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_health_is_not_green_without_an_engine(server: EchoHttp) -> None:
    """From the moment a rank is gone no probe says ready again."""
    os.kill(server.children()["rank-0"], signal.SIGKILL)
    time.sleep(0.3)
    try:
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 503
    except httpx.TransportError:
        assert server.process.wait(TREE_GONE_S) == 1

"""The protocol with a fake peer in its own process, and the order in which sides take turns."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from peers.cells import Cell, Pair, Side
from peers.maths import Floor
from peers.protocol import PeerError, Worker
from peers.rounds import Store, run_pair

BENCHMARK = Path(__file__).parents[3] / "benchmark"
FAKE = """
import os, sys, time
from peers.worker import own_stdout, serve
class Fake:
    API = "in process"
    def prepare(self, model, target, weights): pass
    def start(self, model, target, weights, threads, context, sequences):
        print("a peer that prints"); os.write(1, b"and its C code too\\n")
    def generate(self, prompts, new_tokens):
        if new_tokens == 13: raise ValueError("unlucky")
        if new_tokens == 14: os._exit(3)
        if new_tokens == 15: time.sleep(60)
        return [[0.5 + i for i in range(new_tokens)] for _ in prompts]
    def stop(self): pass
replies = own_stdout()
serve(Fake(), sys.stdin, replies)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK)}
    worker = Worker([sys.executable, "-c", FAKE], environment, tmp_path / "log")
    yield worker
    worker.close()
    assert worker.process.returncode is not None


def start(worker: Worker) -> None:
    sizes = {"threads": 1, "context": 1, "sequences": 1}
    worker.call("start", 20, model="m", target="t", weights="bf16", **sizes)


def test_replies_are_not_mixed_up_with_what_a_peer_prints(worker: Worker, tmp_path: Path) -> None:
    assert worker.call("api", 20) == "in process"
    start(worker)
    assert worker.call("generate", 20, prompts=[[1], [2]], new_tokens=2) == [[0.5, 1.5]] * 2
    log = (tmp_path / "log").read_text()
    assert "a peer that prints" in log
    assert "and its C code too" in log


def test_an_error_is_told_and_the_peer_goes_on(worker: Worker) -> None:
    with pytest.raises(PeerError, match="generate: ValueError: unlucky"):
        worker.call("generate", 20, prompts=[[1]], new_tokens=13)
    with pytest.raises(PeerError, match="no method '__class__'"):
        worker.call("__class__", 20)
    assert worker.call("generate", 20, prompts=[[1]], new_tokens=1) == [[0.5]]


def test_a_peer_that_dies_or_hangs_is_an_error(worker: Worker) -> None:
    with pytest.raises(PeerError, match="generate: no answer in time"):
        worker.call("generate", 0.2, prompts=[[1]], new_tokens=15)


def test_a_dead_peer_is_an_error(worker: Worker) -> None:
    with pytest.raises(PeerError, match="the peer ended with 3"):
        worker.call("generate", 20, prompts=[[1]], new_tokens=14)


def state(worker: Worker) -> str:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_paused_peer_stands_still_until_it_is_asked(worker: Worker) -> None:
    worker.call("api", 20)
    worker.pause()
    deadline = time.monotonic() + 5
    while state(worker) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(worker) == "T"
    assert worker.call("api", 20) == "in process"
    assert state(worker) != "T"


class FakeEngine:
    """Writes down who was asked for what."""

    api, versions, cold_start_s = "in process", {"fake": "1"}, 1.5

    def __init__(self, name: str, story: list[str]) -> None:
        self.name, self.story, self.pid = name, story, os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        if len(prompts[0]) == 99:
            raise PeerError("out of memory")
        self.story.append(f"{self.name}:{len(prompts)}x{len(prompts[0])}:{prompts[0][0]}")
        return [[0.5 + i for i in range(new_tokens)] for _ in prompts]

    def pause(self) -> None:
        self.story.append(f"{self.name} sleeps")

    def close(self) -> None:
        self.story.append(f"{self.name} ends")


def measure(pair: Pair, store: Store, cells: Sequence[Cell]) -> list[str]:
    story: list[str] = []
    run_pair(
        pair, cells, lambda side: FakeEngine(side.name, story), store, lambda _: Floor(1.0, 1.0)
    )
    return story


PAIR = Pair("pair", Side("peer", "peer"), Side("ours"), (Cell(1, 8, 3), Cell(2, 4, 3)))


def test_sides_take_turns_and_the_one_not_asked_is_paused(tmp_path: Path) -> None:
    store = Store(tmp_path / "out.json", {"commit": "c"})
    story = measure(PAIR, store, PAIR.cells[:1])
    timed = story[story.index("ours sleeps") + 1 : -2]
    order = [entry.split(":")[0] for entry in timed]
    assert order == [
        *("peer sleeps", "ours", "ours sleeps", "peer"),
        *("ours sleeps", "peer", "peer sleeps", "ours"),
    ]
    tokens = [entry.split(":")[2] for entry in timed if ":" in entry]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    assert story[-2:] == ["ours ends", "peer ends"]
    kept = json.loads((tmp_path / "out.json").read_text())
    assert [row["kind"] for row in kept["raw"]] == ["floor", "start", "start", "cell", "floor"]


def test_a_run_that_was_cut_off_goes_on_with_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    measure(PAIR, Store(path, {}), PAIR.cells[:1])
    again = Store(path, {})
    again.load()
    story = measure(PAIR, again, PAIR.cells)
    asked = [entry for entry in story if ":2x4:" in entry or ":1x8:" in entry]
    assert len([entry for entry in asked if ":2x4:" in entry]) == 4
    warmed = [entry for entry in asked if ":1x8:" in entry]
    assert len(warmed) == 2, "the measured cell is not run again, its length warms both sides up"
    assert measure(PAIR, again, PAIR.cells) == []


def test_a_side_that_fails_is_recorded_and_the_rest_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "out.json", {})
    cells = (Cell(1, 8, 3), Cell(1, 99, 3), Cell(1, 7, 3))
    story = measure(PAIR, store, cells)
    assert [row["cell"] for row in store.of("cell", "pair")] == ["b1_8"]
    assert store.of("skipped", "pair")[0]["why"] == "b1_99: out of memory"
    assert story[-2:] == ["ours ends", "peer ends"]
    again = Store(tmp_path / "out.json", {})
    again.load()
    assert again.of("skipped", "pair") == []
    assert [cell.length for cell in again.left(PAIR, cells)] == [99, 7]


def test_a_side_that_does_not_start_ends_the_other() -> None:
    store, story = Store(None, {}), list[str]()

    def starts(side: Side) -> FakeEngine:
        if side.name == "ours":
            raise PeerError("our server does not know --quantization yet")
        return FakeEngine(side.name, story)

    run_pair(PAIR, PAIR.cells, starts, store, lambda _: Floor(1.0, 1.0))
    assert "--quantization" in store.of("skipped", "pair")[0]["why"]
    assert story[-1] == "peer ends"

"""``--trace-file``: a timeline of what every rank did, from a server that ended in good order."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import httpx
from test.kit.echo_http import EchoHttp, write_model


def test_the_timeline_shows_steps_of_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    # A plan for each step: bursts that end early leave epochs out.
    arguments = ("--sp-size", "2", "--trace-file", str(path), "--disable-overlap-schedule")
    with EchoHttp(Path("embedded"), *arguments, device="cpu") as server:
        server.wait_ready(60)
        assert server.generate("one two three " * 100, 6).status_code == 200
        for path_of, count in (("/stop_profile", 5), ("/start_profile", 7)):
            assert httpx.get(f"{server.url}{path_of}").status_code == 200
            assert server.generate("four five", count).status_code == 200
        assert server.end() == 0
    events = json.loads(path.read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "rank-0", 1: "rank-1", 1000: "scheduler"}
    for rank in (0, 1):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        counts = Counter(e["name"] for e in spans)
        assert counts["prefill"] >= 1 and counts["attention"] >= 1, counts
        steps = [e for e in spans if e["cat"] == "step"]
        for before, after in itertools.pairwise(steps):
            assert before["ts"] + before["dur"] <= after["ts"]
    epochs = sorted({e["args"]["epoch"] for e in events if e.get("cat") == "step"})
    gaps = [after - before for before, after in itertools.pairwise(epochs)]
    assert sorted(gaps)[-2] == 1 and max(gaps) >= 6, "what ran while it was paused is not there"


def test_without_a_timeline_there_is_nothing_to_pause(tmp_path: Path) -> None:
    with EchoHttp(write_model(tmp_path)) as server:
        server.wait_ready()
        refused = httpx.post(f"{server.url}/start_profile")
        assert refused.status_code == 400 and "--trace-file" in refused.json()["error"]["message"]


def test_a_timeline_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "trace.json"
    with EchoHttp(Path("embedded"), "--trace-file", str(path)) as server:
        assert server.process.wait(20) == 2
        assert str(path) in server.log.read_text()

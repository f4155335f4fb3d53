"""The timeline file: several processes, one array that any JSON reader takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from sps_runtime.telemetry import timeline
from sps_runtime.telemetry.timeline import NoTimeline, TraceFile, open_timeline, traced


def spans(path: Path) -> list[dict[str, object]]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_spans_nest_and_keep_their_details(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    rank = TraceFile(path, 3, "rank-3")
    before = time.monotonic_ns() / 1e3
    with rank.span("step", "step", epoch=7), rank.span("linear", "compute"):
        time.sleep(0.002)
    rank.close()
    timeline.finish(path)
    inner, outer = spans(path)
    assert (inner["name"], outer["name"], outer["args"]) == ("linear", "step", {"epoch": 7})
    assert {inner["pid"], outer["pid"]} == {3}
    assert before <= outer["ts"] <= inner["ts"]
    assert outer["dur"] >= inner["dur"] >= 2000
    assert outer["ts"] + outer["dur"] >= inner["ts"] + inner["dur"]


def test_a_span_that_was_timed_elsewhere_is_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    rank = TraceFile(path, 0, "rank-0")
    rank.add("linear", "kernel", 5_000_000, 5_002_500)
    rank.close()
    timeline.finish(path)
    (span,) = spans(path)
    assert (span["name"], span["cat"], span["ts"], span["dur"]) == ("linear", "kernel", 5000, 2.5)


def test_a_span_is_written_when_its_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    rank = TraceFile(path, 0, "rank-0")
    with pytest.raises(KeyError), rank.span("broken", "step"):
        raise KeyError
    rank.close()
    timeline.finish(path)
    assert [span["name"] for span in spans(path)] == ["broken"]


def test_threads_have_rows_of_their_own_by_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    rank = TraceFile(path, 0, "rank-0")

    def work() -> None:
        for _ in range(500):
            with rank.span("x" * 200, "step"):  # enough for several flushes
                pass

    for _ in range(2):
        threads = [threading.Thread(target=work, name=f"block-{i}") for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with rank.span("main", "step"):
        pass
    rank.close()
    timeline.finish(path)
    events = json.loads(path.read_text())
    rows = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert set(rows) == {"block-0", "block-1", "block-2"} and sorted(rows.values()) == [1, 2, 3]
    spans_of = Counter(span["tid"] for span in spans(path))
    assert spans_of == {0: 1, 1: 1000, 2: 1000, 3: 1000}


WRITER = """
import sys
from sps_runtime.telemetry.timeline import TraceFile
rank = TraceFile(sys.argv[1], int(sys.argv[2]), "r")
for index in range(3000):
    with rank.span("x" * (index % 97 + 1), "step", index=index):
        pass
rank.close()
"""


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    timeline.finish(path)
    found = spans(path)
    for number in range(3):
        mine = [span["args"] for span in found if span["pid"] == number]
        assert mine == [{"index": index} for index in range(3000)]


def test_nothing_is_written_where_nobody_looks(tmp_path: Path) -> None:
    silent = open_timeline("", 0, "rank-0")
    assert isinstance(silent, NoTimeline) and not silent.on
    with silent.span("step", "step"):
        pass
    silent.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_traced_call_answers_as_before(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.create(path)
    rank = TraceFile(path, 0, "rank-0")
    assert traced(rank, "power", "compute", pow)(2, 5) == 32
    rank.close()
    timeline.finish(path)
    assert [span["name"] for span in spans(path)] == ["power"]

"""What `make serve` starts: the embedded model on two CPU ranks, the real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from test.kit.echo_engine import alive, eventually
from test.kit.echo_http import EchoHttp, Stream

GREEDY = {"temperature": 0, "max_new_tokens": 12}
DOCUMENT = "The weather was fine and the streets were quiet. " * 120


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    with EchoHttp(Path("embedded"), "--sp-size", "2", device="cpu") as running:
        running.wait_ready(60.0)
        yield running


def generate(server: EchoHttp, text: str) -> dict:
    body = {"text": text, "sampling_params": GREEDY}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_long_prompt_is_answered_and_cached(server: EchoHttp) -> None:
    cold = generate(server, DOCUMENT)
    warm = generate(server, DOCUMENT)
    assert cold["output_ids"] and cold["output_ids"] == warm["output_ids"]
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] > 500


def test_forks_that_arrive_at_once_compute_their_document_once(server: EchoHttp) -> None:
    document, ask = "On the second day it rained and the streets were empty. " * 100, 6
    with ThreadPoolExecutor(ask) as pool:
        texts = [f"{document} Question {k}: why?" for k in range(ask)]
        answers = list(pool.map(lambda text: generate(server, text)["meta_info"], texts))
    cached = sorted(answer["cached_tokens"] for answer in answers)
    assert cached[0] == 0
    assert min(cached[1:]) == max(cached) > 1000
    assert answers[0]["prompt_tokens"] - max(cached) < 100  # all but the question, in whole pages


def test_forks_go_on_when_the_client_of_the_first_is_gone(server: EchoHttp) -> None:
    """It gives up after 0.3 s; whatever was written by then is not computed again."""
    document = "On the fourth day the wind blew and the shutters banged. " * 600
    with ThreadPoolExecutor(3) as pool:
        body = {"text": f"{document} Who?", "sampling_params": GREEDY}
        pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=0.3)
        time.sleep(0.15)
        texts = [f"{document} Question {k}: why?" for k in range(2)]
        answers = list(pool.map(lambda text: generate(server, text)["meta_info"], texts))
    most = max(answer["cached_tokens"] for answer in answers)
    assert answers[0]["prompt_tokens"] - most < 100


def test_samples_of_one_prompt_compute_it_once(server: EchoHttp) -> None:
    text = "On the third day the sun came out and people sat outside. " * 100
    body = {"text": text, "sampling_params": {"max_new_tokens": 1, "n": 4}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    cached = sorted(sample["meta_info"]["cached_tokens"] for sample in answer.json())
    assert cached[0] == 0 and min(cached[1:]) == max(cached) > 1000


def test_vectors_do_not_depend_on_the_cache_and_run_beside_streams(server: EchoHttp) -> None:
    """Two ranks; the same text cold and warm, and another one."""
    stream = Stream(server, 400)
    assert stream.started.wait(30)
    texts = ["A document of its own. " * 90, "A document of its own. " * 90, DOCUMENT]
    found = [
        httpx.post(f"{server.url}/v1/embeddings", json={"input": text}, timeout=60).json()
        for text in texts
    ]
    cold, warm, other = (np.array(answer["data"][0]["embedding"]) for answer in found)
    assert cold @ cold == pytest.approx(1, abs=1e-5)
    assert cold @ warm > 0.999 > cold @ other + 1e-4
    stream.join(60)
    assert stream.outcome == "finished"


def listening_ports(pids: list[int]) -> set[int]:
    """TCP ports that any of these processes listens on."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def test_http_is_the_only_listener(server: EchoHttp) -> None:
    pids = [server.process.pid, *server.children().values()]
    assert listening_ports(pids) == {server.port}


def test_a_killed_rank_ends_it(server: EchoHttp) -> None:  # the last of this module
    children = server.children()
    stream = Stream(server, 20_000)
    assert stream.started.wait(10)
    began = time.monotonic()
    os.kill(children["rank-1"], signal.SIGKILL)
    stream.join(4.0)
    assert stream.outcome == "error event"
    assert server.process.wait(5.0) == 1
    eventually(lambda: not any(map(alive, children.values())), 1.0, "the tree is gone")
    assert not list(server.temporary.iterdir())
    assert time.monotonic() - began < 5.0

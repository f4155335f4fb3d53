"""The whole server: launcher, HTTP, scheduler and two echo ranks as processes.

Echo ranks answer with a hash of what they read through the page tables, so every answer is known
and one wrong page anywhere would change it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from test.kit.server_process import EOS, VOCAB_SIZE, ServerProcess, write_echo_model

from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.runner.echo_answers import echo_generate

FLAGS = ("--sp-size", "2", "--page-size", "16", "--chunked-prefill-size", "128")
FLAGS += ("--enable-metrics", "--enable-cache-report", "--served-model-name", "echo")
FLAGS += ("--log-level", "info")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echo_model(tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[ServerProcess]:
    with ServerProcess(directory, FLAGS) as running:
        yield running


def text_of(tokenizer: Tokenizer, prompt: list[int], count: int) -> str:
    ids = echo_generate(prompt, count, vocab=VOCAB_SIZE, stop_ids=(EOS,))
    return tokenizer.decode(ids[:-1] if ids[-1] == EOS else ids)


def test_many_streams_each_right(server: ServerProcess, tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    shared = "The lazy dog, naïve café 你好! " * 40

    def one(number: int) -> None:
        prompt = shared[: rng.randrange(len(shared))] + f" question {number}"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        chunks = client.completions.create(
            model="echo", prompt=prompt, max_tokens=50, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == text_of(tokenizer, tokenizer.encode(prompt), 50)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(64)))


def test_cache_usage_and_state(server: ServerProcess, tokenizer: Tokenizer) -> None:
    body = {"text": "Cached words, many of them. " * 30, "sampling_params": {"max_new_tokens": 2}}
    with httpx.Client(base_url=server.url, timeout=20) as client:
        first = client.post("/generate", json=body).json()
        second = client.post("/generate", json=body).json()
        assert first["meta_info"]["cached_tokens"] == 0
        prompt = second["meta_info"]["prompt_tokens"]
        assert second["meta_info"]["cached_tokens"] == (prompt - 1) // 16 * 16
        state = client.get("/server_info").json()["internal_states"][0]
        assert state["cached_tokens_total"] >= second["meta_info"]["cached_tokens"]
        assert state["generated_tokens_total"] >= 4
        assert len(state["ranks"]) == 2
        pages = [line for line in client.get("/metrics").text.splitlines() if "pool_pages{" in line]
        assert len(pages) == 6
        assert client.post("/flush_cache").status_code == 200
        third = client.post("/generate", json=body).json()
        assert third["meta_info"]["cached_tokens"] == 0


def test_logprobs_of_prompt_and_answer(server: ServerProcess) -> None:
    body = {
        "text": "The quick brown fox jumps over the lazy dog. " * 40,
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 5,
        "top_logprobs_num": 2,
        "token_ids_logprob": [7],
    }
    for _ in ("cold", "warm"):
        meta = httpx.post(f"{server.url}/generate", json=body, timeout=20).json()["meta_info"]
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] - 5
        assert None not in [value for value, _, _ in meta["input_token_logprobs"]]
        assert all(len(top) == 2 for top in meta["input_top_logprobs"])
        assert all(ids[0][1] == 7 for ids in meta["input_token_ids_logprobs"])
        assert len(meta["output_token_logprobs"]) == 3


def test_stop_strings_and_disconnects_leave_nothing(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        body = {"prompt": "x", "max_tokens": 4000, "stop": list("aeiou"), "ignore_eos": True}
        for number in range(8):
            answer = client.post("/v1/completions", json={**body, "seed": number}).json()
            assert answer["choices"][0]["finish_reason"] == "stop"
        body = {"prompt": "y", "max_tokens": 60_000, "stream": True, "ignore_eos": True}
        for _ in range(8):
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        end = time.monotonic() + 10
        while not idle(client):
            assert time.monotonic() < end
            time.sleep(0.02)


def idle(client: httpx.Client) -> bool:
    """Nothing runs or waits, and every page of a last step's readers has been given back."""
    state = client.get("/server_info").json()["internal_states"][0]
    used = sum(rank["used_pages"] for rank in state["ranks"])
    return not (state["running"] or state["waiting"] or used)


def test_bad_requests_change_nothing(server: ServerProcess, tokenizer: Tokenizer) -> None:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for body in (
            {"prompt": [VOCAB_SIZE]},
            {"prompt": "x", "max_tokens": 70_000},
            {"prompt": "x", "temperature": -1},
            {"prompt": "x", "logit_bias": {str(VOCAB_SIZE): 1}},
        ):
            assert client.post("/v1/completions", json=body).status_code == 400
        body = {"prompt": "fox", "max_tokens": 9, "temperature": 0}
        text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert text == text_of(tokenizer, tokenizer.encode("fox"), 9)


def stream_to_end(url: str, lines: list[str]) -> None:
    body = {"prompt": "z", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            for line in response.iter_lines():
                lines.append(line)
    except httpx.HTTPError:
        lines.append("connection closed")


@pytest.mark.parametrize("victim", ["rank-1", "scheduler", "http"])
def test_death_answers_everyone(directory: Path, victim: str) -> None:
    flags = ("--sp-size", "2", "--log-level", "info")
    with ServerProcess(directory, flags) as server:
        streams: list[list[str]] = [[] for _ in range(4)]
        threads = [
            threading.Thread(target=stream_to_end, args=(server.url, lines)) for lines in streams
        ]
        for thread in threads:
            thread.start()
        while not all(streams):
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(server.child(victim), signal.SIGKILL)
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert server.process.wait(5) != 0
        assert time.monotonic() - began < 5
        for lines in streams:
            data = [line for line in lines if line]
            if victim == "http":
                assert data[-1] == "connection closed"
            else:
                assert data[-1] == "data: [DONE]"
                assert '"error"' in data[-2]


def test_sigterm_drains(directory: Path, tokenizer: Tokenizer) -> None:
    with ServerProcess(directory, ("--sp-size", "2", "--log-level", "info")) as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "fox", "max_tokens": 3000, "temperature": 0, "ignore_eos": True}

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=20))

        thread = threading.Thread(target=ask)
        thread.start()
        while not httpx.get(f"{server.url}/v1/loads").json()["loads"][0]["num_total_reqs"]:
            time.sleep(0.005)
        assert server.terminate() == 0
        thread.join(5)
        assert answers[0].status_code == 200
        ids = echo_generate(tokenizer.encode("fox"), 3000, vocab=VOCAB_SIZE)
        assert answers[0].json()["choices"][0]["text"] == tokenizer.decode(ids)

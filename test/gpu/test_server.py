"""The server end to end on a GPU, one rank and two on the same: greedy answers of the embedded
model in fp32 are the CPU server's, but for tokens that the CPU was not sure of."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
MARGIN, NEW = 1e-3, 24


@contextmanager
def serving(*flags: str) -> Iterator[tuple[str, list[str]]]:
    """A server of the embedded model: its address and its log."""
    command = [sys.executable, "-m", "sps_runtime.launch_server", "--port", "0", *flags]
    paths = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log: list[str] = []
    ready, found = threading.Event(), [""]

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if address := re.search(r"ready after .*(http://\S+)", line):
                found[0] = address[1]
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert ready.wait(180) and found[0], "".join(log)
        yield found[0], log
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> list[dict[str, Any]]:
    """Greedy answers to some prompts, one of several pages, with the two best of each token."""
    found = []
    for length in (3, 200, 1500):
        ids = [300 + (7 * i * i + length) % 700 for i in range(length)]
        body = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        request = urllib.request.Request(
            f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            found.append(json.load(response)["meta_info"])
    return found


def check_tokens(mine: dict[str, Any], theirs: dict[str, Any], log: list[str]) -> None:
    """The same tokens, up to one that the CPU was not sure of."""
    ours, wanted = ([t[1] for t in one["output_token_logprobs"]] for one in (mine, theirs))
    same = next((i for i, (a, b) in enumerate(zip(ours, wanted, strict=True)) if a != b), NEW)
    if same < NEW:
        best, second = (entry[0] for entry in theirs["output_top_logprobs"][same][:2])
        assert best - second < MARGIN, f"token {same}\n" + "".join(log)


@pytest.fixture(scope="module")
def truth() -> list[dict[str, Any]]:
    with serving("--device", "cpu", "--dtype", "float32") as (url, _):
        return answers(url)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize("links", ["auto", "host"])
def test_answers(truth: list[dict[str, Any]], sp: int, links: str) -> None:
    if sp == 1 and links == "host":
        pytest.skip("one rank has no links")
    flags = ["--device", "cuda", "--dtype", "float32", "--sp-size", str(sp)]
    flags += ["--device-links", links, "--max-total-tokens", "32768"]
    with serving(*flags) as (url, log):
        found = answers(url)
    for mine, theirs in zip(found, truth, strict=True):
        check_tokens(mine, theirs, log)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_tensor_parallel_answers(truth: list[dict[str, Any]], graphs: bool) -> None:
    """Over NCCL, decode steps of both ranks captured with their exchanges and not."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each rank")
    flags = ["--device", "cuda", "--dtype", "float32", "--tp-size", "2"]
    flags += [] if graphs else ["--disable-step-graphs"]
    with serving(*flags, "--max-total-tokens", "32768") as (url, log):
        found = answers(url)
    for mine, theirs in zip(found, truth, strict=True):
        check_tokens(mine, theirs, log)


@pytest.mark.timeout(300)
def test_bf16_answers() -> None:
    """The backend that is chosen by itself, with recorded steps: it answers, and is named."""
    with serving("--device", "cuda", "--dtype", "bfloat16") as (url, log):
        assert all(one["completion_tokens"] == NEW for one in answers(url))
    assert any("attention flashinfer" in line or "attention triton" in line for line in log)

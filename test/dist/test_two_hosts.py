"""One engine on two hosts that share nothing but a wire: same tokens, and they die together."""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark.make_model import make_model
from sps_runtime.engine import Engine
from test.kit.hosts import ADDRESSES, TwoHosts, available

PROMPTS = (1, 63, 64, 65, 300)
NEW_TOKENS = 24
LONG = 12_500

_ASK = """
import json, sys, time, urllib.request
body = json.loads({body!r})
for _ in range(600):
    try:
        urllib.request.urlopen("http://127.0.0.1:30000/health", timeout=5).read()
        break
    except OSError:
        time.sleep(0.1)
request = urllib.request.Request("http://127.0.0.1:30000/generate", json.dumps(body).encode(),
                                 {{"Content-Type": "application/json"}})
print(urllib.request.urlopen(request, timeout=100).read().decode())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model("tiny-qwen3", folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(5, 250) for _ in range(length)] for length in PROMPTS]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    why_not = available()
    if why_not:
        if os.environ.get("CI"):
            pytest.fail(why_not)
        pytest.skip(why_not)
    with TwoHosts(tmp_path) as two:
        yield two


def serve(hosts: TwoHosts, model: Path, *flags: str) -> list[subprocess.Popen[bytes]]:
    """Start node 0 and node 1 of one engine with two SP ranks."""
    key = {"SPS_DIST_KEY": secrets.token_hex(32)}
    common = [sys.executable, "-m", "sps_runtime.launch_server", "--model-path", str(model)]
    common += ["--dtype", "float32", "--sp-size", "2", "--nnodes", "2", "--threads-per-rank", "1"]
    common += ["--dist-init-addr", f"{ADDRESSES[0]}:29500", "--max-total-tokens", "4096", *flags]
    return [
        hosts.start(node, *common, "--node-rank", str(node), environment=key) for node in (0, 1)
    ]


def ask(hosts: TwoHosts, body: dict[str, object]) -> list[dict[str, object]]:
    answer = json.loads(hosts.run_python(0, _ASK.format(body=json.dumps(body)), timeout=110))
    return list(answer)


def sampling(new_tokens: int) -> dict[str, object]:
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


@pytest.mark.parametrize("strategy", ["pass-kv", "pass-q", "ulysses"])
def test_same_tokens_as_one_rank(
    hosts: TwoHosts, model: Path, prompts: list[list[int]], strategy: str
) -> None:
    serve(hosts, model, "--sp-strategy", strategy)
    body = {"input_ids": prompts, "sampling_params": sampling(NEW_TOKENS)}
    got = [answer["output_ids"] for answer in ask(hosts, body)]
    with Engine(str(model), dtype="float32", max_total_tokens=4096) as engine:
        want = engine.generate(input_ids=prompts, sampling_params=sampling(NEW_TOKENS))
    assert got == [answer["output_ids"] for answer in want]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_quantised_kv_travels(
    hosts: TwoHosts, model: Path, prompts: list[list[int]], kv_dtype: str
) -> None:
    serve(hosts, model, "--sp-strategy", "pass-kv", "--kv-cache-dtype", kv_dtype)
    body = {"input_ids": prompts, "sampling_params": sampling(NEW_TOKENS)}
    got = [answer["output_ids"] for answer in ask(hosts, body)]
    with Engine(
        str(model), dtype="float32", max_total_tokens=4096, kv_cache_dtype=kv_dtype
    ) as engine:
        want = engine.generate(input_ids=prompts, sampling_params=sampling(NEW_TOKENS))
    assert got == [answer["output_ids"] for answer in want]


@pytest.mark.parametrize("victim", [0, 1])
def test_hosts_die_together(
    hosts: TwoHosts, model: Path, prompts: list[list[int]], victim: int
) -> None:
    nodes = serve(hosts, model)
    ask(hosts, {"input_ids": prompts[:1], "sampling_params": sampling(4)})
    os.killpg(nodes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    assert nodes[1 - victim].wait(10) != 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("flags", [[], ["--disable-sp-pipeline"]])
def test_a_bound_is_held_as_on_one_host(hosts: TwoHosts, model: Path, flags: list[str]) -> None:
    """Of a prompt long enough for superblocks: what was read and dropped, and fewer bytes where
    the bound is held."""
    rng = random.Random(8)
    body = {"input_ids": [[rng.randrange(5, 250) for _ in range(LONG)]]}
    body["sampling_params"] = sampling(2)
    asked = [{"mode": "csa", "max_tau": max_tau} for max_tau in (0.95, 0.5)]
    room = {"max_total_tokens": 4 * LONG, "context_length": LONG + 64, "csa_min_tokens": 1}
    flags = [*flags, *(f"--{name.replace('_', '-')}={value}" for name, value in room.items())]
    serve(hosts, model, *flags)
    got = [ask(hosts, {**body, "attention": each}) for each in asked]
    with Engine(str(model), dtype="float32", sp_size=2, **room) as engine:
        want = [engine.generate(**body, attention=each) for each in asked]
    reports = [[answer["meta_info"]["attention"] for (answer,) in side] for side in (got, want)]
    for one, other in zip(*reports, strict=True):
        for name in ("mode", "density", "fallbacks", "tau_samples"):
            assert one[name] == other[name]
        for name in ("tau_mean", "tau_p95", "tau_max", "tau_last"):
            assert math.isclose(one[name], other[name], abs_tol=1e-4)
    held, exceeded = reports[0]
    assert held["fallbacks"] == 0 < exceeded["fallbacks"]
    assert held["tau_mean"] < 0.95 and held["union_share"] < 0.4 < exceeded["union_share"]
    assert 2 * held["remote_bytes"] < exceeded["remote_bytes"]
    tokens = [[answer["output_ids"] for (answer,) in side] for side in (got, want)]
    assert tokens[0] == tokens[1]

"""Sparse attention through the real processes: the embedded model on two CPU ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from test.kit.echo_http import EchoHttp

SENTENCE = "The weather was fine and the streets of town {} were quiet that day. "
DOCUMENT = "".join(SENTENCE.format(n) for n in range(360))
CSA = {"mode": "csa", "budget": 0.25}


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    flags = ["--sp-size", "2", "--csa-min-tokens", "2048", "--enable-metrics", "--dtype", "float32"]
    with EchoHttp(Path("embedded"), *flags, device="cpu") as running:
        running.wait_ready(60.0)
        yield running


def generate(server: EchoHttp, text: str, attention: Any, **fields: Any) -> httpx.Response:
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling, "attention": attention, **fields}
    return httpx.post(f"{server.url}/generate", json=body, timeout=60)


def meta(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["meta_info"])


def test_a_sparse_prompt_is_answered_with_its_figures(server: EchoHttp) -> None:
    first = meta(generate(server, DOCUMENT, CSA))
    report = first["attention"]
    assert first["prompt_tokens"] > 4500
    assert report["mode"] == "csa" and report["reason"] == ""
    assert 0.5 < report["density"] < 0.95  # 48 pages of 64 tokens at least
    assert 0 < report["union_share"] <= 1 and report["remote_bytes"] > 0
    again = meta(generate(server, DOCUMENT, CSA))
    assert again["cached_tokens"] == first["prompt_tokens"] // 64 * 64


def test_exact_and_sparse_share_no_pages(server: EchoHttp) -> None:
    text = "Another day. " + DOCUMENT
    cached = [
        meta(generate(server, text, attention))["cached_tokens"]
        for attention in (CSA, None, {"mode": "csa", "budget": 0.5}, {"mode": "exact"}, CSA)
    ]
    assert cached[:3] == [0, 0, 0] and cached[3] > 3000 and cached[4] >= 3072


def test_what_drops_nothing_answers_as_exact(server: EchoHttp) -> None:
    text = "A third day. " + DOCUMENT
    sparse = generate(server, text, {"mode": "csa", "tau": 0})
    exact = generate(server, text, {"mode": "exact"})
    assert meta(sparse)["attention"]["density"] == 1.0
    assert sparse.json()["output_ids"] == exact.json()["output_ids"]


def test_generated_tokens_choose_their_pages_too(server: EchoHttp) -> None:
    text = "A fourth day. " + DOCUMENT
    exact = generate(server, text, {"mode": "exact"}).json()["output_ids"]
    whole = {"mode": "csa", "tau": 0, "decode": "sparse"}
    assert generate(server, text, whole).json()["output_ids"] == exact
    some = meta(generate(server, text, {**CSA, "decode": "sparse"}))
    assert some["completion_tokens"] == 6 and some["attention"]["density"] < 0.95


def test_a_short_prompt_runs_exact_and_says_so(server: EchoHttp) -> None:
    report = meta(generate(server, "Short.", CSA))["attention"]
    assert report["mode"] == "exact" and "2048" in report["reason"]


def test_a_bad_field_touches_nobody(server: EchoHttp) -> None:
    answer = generate(server, DOCUMENT, {"mode": "csa", "tau": 3})
    assert answer.status_code == 400 and "attention.tau" in answer.text
    assert meta(generate(server, "Still here.", None))["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client(server: EchoHttp, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer = client.completions.create(
        model="default",
        prompt=DOCUMENT,
        max_tokens=4,
        stream=stream,
        extra_body={"attention": CSA},
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    report = (choices[-1].model_extra or {})["sps_attention"]
    assert report["mode"] == "csa" and report["density"] < 0.95


def test_metrics(server: EchoHttp) -> None:
    generate(server, DOCUMENT, CSA)
    text = httpx.get(f"{server.url}/metrics").text
    counts = [line for line in text.splitlines() if line.startswith("sps:csa_requests_total")]
    assert any('ran="csa"' in line and float(line.split()[-1]) > 0 for line in counts)


def test_what_is_measured_is_reported(server: EchoHttp) -> None:
    report = meta(generate(server, "Measured. " + DOCUMENT, CSA))["attention"]
    assert report["tau_samples"] > 0
    assert 0 <= report["tau_mean"] <= report["tau_p95"] <= report["tau_max"] <= 1
    assert 0 <= report["tau_last"] <= 1 and len(report["tau_worst"]) == 2


def test_a_bound_that_no_choice_meets_makes_it_exact(server: EchoHttp) -> None:
    attention = {**CSA, "max_tau": 0.001}
    answer = generate(server, "A bound. " + DOCUMENT, attention)
    report = meta(answer)["attention"]
    assert report["fallbacks"] > 0 and report["density"] > 0.9
    exact = generate(server, "A bound. " + DOCUMENT, None)
    assert answer.json()["output_ids"] == exact.json()["output_ids"]


def test_stride_attention_reports_one_token_in_s(server: EchoHttp) -> None:
    text, far = "A stride. " + DOCUMENT, {}
    for stride in (1, 4):
        attention = {"mode": "csa", "estimator": "stride", "stride": stride}
        answer = generate(server, text, attention)
        far[stride] = meta(answer)["attention"]
        assert far[stride]["mode"] == "csa" and meta(answer)["cached_tokens"] == 0
        if stride == 1:
            exact = generate(server, text, {"mode": "exact"})
            assert answer.json()["output_ids"] == exact.json()["output_ids"]
    assert far[1]["density"] == pytest.approx(1, abs=1e-3) and 0.4 < far[4]["density"] < 0.7
    assert far[4]["remote_bytes"] == pytest.approx(far[1]["remote_bytes"] / 4, rel=0.01)
    assert (far[1]["union_share"], far[4]["union_share"]) == (1, pytest.approx(0.25, abs=0.01))


def test_a_stride_that_does_not_divide_pages_runs_exact(server: EchoHttp) -> None:
    report = meta(generate(server, DOCUMENT, {"mode": "csa", "estimator": "stride", "stride": 3}))
    assert report["attention"]["mode"] == "exact" and "stride" in report["attention"]["reason"]
    answer = generate(server, "x", {"mode": "csa", "estimator": "stride", "decode": "sparse"})
    assert answer.status_code == 400 and "stride" in answer.text

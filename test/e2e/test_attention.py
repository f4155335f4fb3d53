"""``attention`` on every route that generates, by real clients, over an engine in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

from sps_runtime.types.attention import EXACT, AttentionReport, SparseSettings
from sps_runtime.types.messages import TokensOut

REPORT = AttentionReport("csa", 0.11, 0.2, 12345, 2, 7, 0.1, 0.3, 0.5, 0.2, (1, 0))
SHOWN = {**msgspec.structs.asdict(REPORT), "tau_worst": [1, 0]}


class ReportingEngine(FakeEngine):
    """Says of every csa request what `REPORT` says, with its first token and its last message."""

    def _turn(self, run) -> TokensOut:
        first, news = run.sent == 0, super()._turn(run)
        if run.request.attention.mode == "csa" and (first or news.finish is not None):
            return msgspec.structs.replace(news, attention=REPORT)
        return news


@pytest.fixture(scope="module")
def live(tokenizer_directory: Path) -> Iterator[LiveServer]:
    with LiveServer(tokenizer_directory, ReportingEngine) as server:
        yield server


def sparse(live: LiveServer, index: int = -1) -> SparseSettings | None:
    return live.engine.requests[index].attention.sparse


def generate(http: httpx.Client, **fields: object) -> httpx.Response:
    body = {"text": "abc", "sampling_params": {"max_new_tokens": 3}, **fields}
    return http.post("/generate", json=body)


def test_native(http: httpx.Client, live: LiveServer) -> None:
    attention = {"mode": "csa", "budget": 0.25, "max_tau": 0.5, "estimator": "quest"}
    answer = generate(http, attention=attention)
    assert answer.headers.get("x-sps-ignored") is None
    assert answer.json()["meta_info"]["attention"] == SHOWN
    found = sparse(live)
    assert found is not None and (found.budget, found.max_tau) == (0.25, 0.5)
    for attention in (None, {}, {"mode": "exact"}):
        answer = generate(http, attention=attention)
        assert live.engine.requests[-1].attention == EXACT
        assert "attention" not in answer.json()["meta_info"]


def test_native_batch_and_each_of_it(http: httpx.Client, live: LiveServer) -> None:
    texts = ["a", "b", "c"]
    answers = generate(http, text=texts, attention={"mode": "csa"}).json()
    assert [answer["meta_info"]["attention"] for answer in answers] == [SHOWN] * 3
    each = [{"mode": "csa", "tau": 0.5}, None, {"mode": "csa", "tau": 0.25}]
    answers = generate(http, text=texts, attention=each).json()
    assert ["attention" in answer["meta_info"] for answer in answers] == [True, False, True]
    taus = [found.tau if (found := sparse(live, i)) else None for i in (-3, -2, -1)]
    assert taus == [0.5, None, 0.25]


def test_native_stream(http: httpx.Client) -> None:
    lines = generate(http, stream=True, attention={"mode": "csa"}).text.split("\n\n")
    events = [msgspec.json.decode(line[6:]) for line in lines if line.startswith("data: {")]
    assert [event["meta_info"].get("attention") for event in events] == [SHOWN] * len(events)


def test_a_stop_string_does_not_hide_the_report(http: httpx.Client) -> None:
    sampling = {"max_new_tokens": 100, "stop": ["ca"]}
    answer = generate(http, sampling_params=sampling, attention={"mode": "csa"}).json()
    assert answer["meta_info"]["finish_reason"]["matched"] == "ca"
    assert answer["meta_info"]["attention"] == SHOWN


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_openai(client: openai.OpenAI, live: LiveServer, chat: bool, stream: bool) -> None:
    options = {
        "model": "default",
        "max_tokens": 3,
        "stream": stream,
        "extra_body": {"attention": {"mode": "csa", "budget": 0.5, "decode": "sparse"}},
    }
    if chat:
        messages = [{"role": "user", "content": "abc"}]
        answer = client.chat.completions.create(messages=messages, **options)
    else:
        answer = client.completions.create(prompt="abc", **options)
    choice = [chunk.choices[0] for chunk in answer][-1] if stream else answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.model_extra is not None and choice.model_extra["sps_attention"] == SHOWN
    found = sparse(live)
    assert found is not None and (found.budget, found.decode) == (0.5, "sparse")


def test_openai_answers_of_exact_requests_have_no_further_field(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="default", prompt="abc", max_tokens=3).choices[0]
    assert "sps_attention" not in (choice.model_extra or {})


BAD = [
    ({"mode": "dense"}, "attention.mode"),
    ({"mode": "csa", "tau": 2}, "attention.tau"),
    ({"mode": "csa", "tau": "much"}, "attention.tau"),
    ({"mode": "csa", "max_tau": -1}, "attention.max_tau"),
    ({"mode": "csa", "budget": 0}, "attention.budget"),
    ({"mode": "csa", "estimator": "tea leaves"}, "attention.estimator"),
    ({"mode": "csa", "decode": 3}, "attention.decode"),
    ({"mode": "csa", "page_size": 3}, "attention"),
    ({"tau": 0.1}, "attention.mode"),
    ("csa", "attention"),
    (["csa"], "attention[0]"),
]


@pytest.mark.parametrize(("attention", "field"), BAD)
@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_bad_field_is_refused_by_name_and_reaches_nobody(
    http: httpx.Client, live: LiveServer, route: str, attention: object, field: str
) -> None:
    before = len(live.engine.requests)
    body = {"text": "abc", "prompt": "abc", "messages": [{"role": "user", "content": "abc"}]}
    kept = {"/generate": "text", "/v1/completions": "prompt"}.get(route, "messages")
    answer = http.post(route, json={kept: body[kept], "attention": attention})
    error = answer.json()["error"] if "error" in answer.json() else answer.json()
    assert answer.status_code == 400
    if route != "/generate" and isinstance(attention, list):
        field = "attention"
    assert field in error["message"] and error.get("param", field) == field
    assert len(live.engine.requests) == before


def test_a_bad_field_of_one_prompt_names_it(http: httpx.Client, live: LiveServer) -> None:
    before = len(live.engine.requests)
    each = [{"mode": "csa"}, {"mode": "csa", "tau": 7}]
    answer = generate(http, text=["a", "b"], attention=each)
    assert answer.status_code == 400 and "attention[1].tau" in answer.text
    assert len(live.engine.requests) == before
    assert generate(http, text=["a", "b"], attention=[None]).status_code == 400


def test_metrics_count_what_ran(http: httpx.Client) -> None:
    generate(http, attention={"mode": "csa"})
    text = http.get("/metrics").text
    assert 'sps:csa_requests_total{model_name="test-model",ran="csa"}' in text
    for name in ("csa_density_bucket", "csa_remote_bytes_total", "csa_fallbacks_total", "csa_tau"):
        assert f"sps:{name}" in text

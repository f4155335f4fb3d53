"""Options on every route: what would change the answer is refused by name, the rest is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from test.kit import tokenizers as kinds
from test.kit.live_server import LiveServer

from sps_runtime.server.app import ROUTES
from sps_runtime.types.tokens import unpack_ids

MESSAGES = [{"role": "user", "content": "a"}]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"query": "a", "items": "b", "label_token_ids": [1]},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/encode": {"text": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/abort_request": {"rid": "nobody"},
}
BODIES = [(spec.path, spec.accepts) for spec in ROUTES if spec.accepts is not None]
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate")


def test_every_route_with_a_body_is_here() -> None:
    assert {path for path, _ in BODIES} == LEAST.keys()


@pytest.mark.parametrize("path", LEAST)
def test_unknown_options_are_accepted_and_named(http: httpx.Client, path: str) -> None:
    body = {**LEAST[path], "wibble": 1, "user": "me", "a b": 2, "zeta": None}
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-sps-ignored"] == "wibble, zeta, +1"
    assert "x-sps-ignored" not in http.post(path, json=LEAST[path]).headers


@pytest.mark.parametrize("path", STREAMS)
def test_streams_name_them_too(http: httpx.Client, path: str) -> None:
    with http.stream("POST", path, json={**LEAST[path], "stream": True, "wibble": 1}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-sps-ignored"] == "wibble"


@pytest.mark.parametrize("path", LEAST)
def test_what_would_change_the_answer_is_refused_by_name(http: httpx.Client, path: str) -> None:
    (accepts,) = (accepts for known, accepts in BODIES if known == path)
    fields = set(accepts.kind.__struct_encode_fields__)
    for name in sorted(accepts.unsupported - fields):
        refused = http.post(path, json={**LEAST[path], name: "x"})
        error = refused.json()["error"]
        assert refused.status_code == 400, name
        assert name in error["message"]
        if not path.startswith("/v1/messages"):  # Anthropic's form has no field for it
            assert (error["param"], error["code"]) == (name, "unsupported_option")
        for nothing in (None, [], {}, "", False):
            assert http.post(path, json={**LEAST[path], name: nothing}).status_code == 200, name


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("/v1/chat/completions", {"add_special_tokens": False}),
        ("/v1/chat/completions", {"include_reasoning": True}),
        ("/v1/completions", {"best_of": 1}),
        ("/v1/responses", {"truncation": "disabled"}),
        ("/v1/responses", {"top_logprobs": 0}),
        ("/v1/messages", {"presence_penalty": 0.0}),
        ("/v1/chat/completions", {"reasoning_effort": None}),
    ],
)
def test_what_is_done_anyway_may_be_asked_for(
    http: httpx.Client, path: str, option: dict[str, Any]
) -> None:
    assert http.post(path, json={**LEAST[path], **option}).status_code == 200


def test_special_tokens_around_a_text_can_be_left_out(http: httpx.Client) -> None:
    messages = {"messages": MESSAGES}
    opened = http.post("/tokenize", json=messages).json()["tokens"]
    closed = http.post("/tokenize", json={**messages, "add_generation_prompt": False}).json()
    assert len(closed["tokens"]) < len(opened)
    assert opened[: len(closed["tokens"])] == closed["tokens"]
    refused = http.post("/tokenize", json={**messages, "chat_template_kwargs": {"x": 1}})
    assert refused.json()["error"]["param"] == "chat_template_kwargs"


def test_a_beginning_of_sequence_can_be_left_out(tmp_path: Path) -> None:
    directory = kinds.write_directory(tmp_path, kinds.sentencepiece_tokenizer(), bos_token="<s>")
    with LiveServer(directory) as live, httpx.Client(base_url=live.url, timeout=20) as http:
        ids = http.post("/tokenize", json={"prompt": "fox"}).json()["tokens"]
        body = {"prompt": "fox", "add_special_tokens": False}
        assert [1, *http.post("/tokenize", json=body).json()["tokens"]] == ids
        http.post("/v1/completions", json={**body, "max_tokens": 1})
        http.post("/v1/embeddings", json={"input": "fox", "add_special_tokens": False})
        sent = [unpack_ids(request.tokens).tolist() for request in live.engine.requests[-2:]]
        assert sent == [ids[1:], ids[1:]]


def test_routes_of_text_know_the_option(http: httpx.Client) -> None:
    for path in ("/tokenize", "/v1/completions", "/v1/embeddings"):
        body = {**LEAST[path], "add_special_tokens": False}
        assert "x-sps-ignored" not in http.post(path, json=body).headers


def test_the_document_is_served(http: httpx.Client) -> None:
    served = http.get("/openapi.json").json()
    assert set(LEAST) <= served["paths"].keys()

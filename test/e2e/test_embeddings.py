"""Vectors and scores over HTTP: every form of input and output, usage, errors."""

from __future__ import annotations

import base64
import math
from array import array
from pathlib import Path

import httpx
import openai
import pytest
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4]]


def unit(*values: float) -> list[float]:
    length = math.hypot(*values)
    return [value / length for value in values]


def vector(prompt: list[int], *, normalize: bool = True) -> list[float]:
    """What the fake engine says of a prompt."""
    values = [len(prompt), prompt[0], prompt[-1], 1]
    return pytest.approx(unit(*values) if normalize else values, abs=1e-6)


def test_the_openai_client_reads_both_encodings(client: openai.OpenAI) -> None:
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model="default", input=PROMPTS, encoding_format=encoding)
        for item, prompt in zip(answer.data, PROMPTS, strict=True):
            found = item.embedding
            if isinstance(found, str):
                found = array("f", base64.b64decode(found)).tolist()
            assert found == vector(prompt)
        assert [item.index for item in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8
    untold = client.embeddings.create(model="default", input="hello")  # base64 inside the client
    assert math.hypot(*untold.data[0].embedding) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("route", ["/v1/embeddings", "/encode"])
def test_text_and_its_ids_are_the_same(http: httpx.Client, route: str) -> None:
    ids = http.post("/tokenize", json={"prompt": "The quick fox"}).json()["tokens"]
    found = []
    for given in ("The quick fox", ids, ["The quick fox"], [ids]):
        field = "input" if route != "/encode" else "text" if "T" in str(given) else "input_ids"
        answer = http.post(route, json={field: given, "normalize": False}).json()
        one = answer["data"][0] if route != "/encode" else answer
        found.append((one[0] if isinstance(one, list) else one)["embedding"])
    assert all(embedding == vector(ids, normalize=False) for embedding in found)


def test_encode_is_sglangs(http: httpx.Client) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0}, "rid": "mine"}
    one = http.put("/encode", json=body).json()
    assert one["embedding"] == vector([5, 6, 7])
    assert one["meta_info"]["id"] == "mine" and one["meta_info"]["prompt_tokens"] == 3
    many = http.post("/encode", json={"input_ids": PROMPTS}).json()
    assert [item["embedding"] for item in many] == [vector(prompt) for prompt in PROMPTS]


def test_more_inputs_than_one_batch_holds(live: LiveServer, http: httpx.Client) -> None:
    inputs = [[1 + index % 200, 5] for index in range(150)]
    answer = http.post("/v1/embeddings", json={"input": inputs}).json()
    assert [item["embedding"] for item in answer["data"]] == [vector(ids) for ids in inputs]
    before = len(live.engine.requests)
    refused = http.post("/v1/embeddings", json={"input": [*inputs, [100_000]]})
    assert refused.status_code == 400 and "input" in refused.json()["error"]["param"]
    assert len(live.engine.requests) == before, "nothing runs when one is wrong"
    assert http.post("/v1/embeddings", json={"input": [[1]] * 2049}).status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "attention": {"mode": "none"}}, "attention.mode"),
        ({"input": [1] * 5000}, "input"),
    ],
)
def test_what_cannot_be_embedded(http: httpx.Client, body: dict, param: str) -> None:
    refused = http.post("/v1/embeddings", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_unknown_options_are_named_and_models_checked(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": "x", "colour": "red", "user": "u"})
    assert answer.headers["x-sps-ignored"] == "colour"
    assert http.post("/v1/embeddings", json={"input": "x", "model": "gpt"}).status_code == 404


def score(http: httpx.Client, **body: object) -> dict:
    answer = http.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_scores_are_probabilities_of_labels(live: LiveServer, http: httpx.Client) -> None:
    """The fake engine gives every id i the logprob -i."""
    answer = score(http, query=[5, 6], items=[[7], [8]], label_token_ids=[0, 2, 0])
    assert answer["object"] == "scoring"
    assert answer["scores"] == [pytest.approx([1, math.exp(-2), 1])] * 2
    assert answer["usage"]["prompt_tokens"] == 6
    sent = [list(array("i", request.tokens)) for request in live.engine.requests[-2:]]
    assert sent == [[5, 6, 7], [5, 6, 8]]
    score(http, query=[5, 6], items=[[7]], label_token_ids=[1], item_first=True)
    assert list(array("i", live.engine.requests[-1].tokens)) == [7, 5, 6]


def test_softmax_is_among_the_labels(http: httpx.Client) -> None:
    answer = score(http, query="a", items=["b", "c"], label_token_ids=[3, 4], apply_softmax=True)
    high = 1 / (1 + math.exp(-1))
    assert answer["scores"] == [pytest.approx([high, 1 - high])] * 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "a", "items": "b"}, "label_token_ids"),
        ({"query": "a", "items": "b", "label_token_ids": [99999]}, "label_token_ids"),
        ({"query": "a", "items": [[1]], "label_token_ids": [1]}, "items"),
        ({"query": [1], "items": "b", "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [], "label_token_ids": [1]}, "items"),
        ({"query": "", "items": "", "label_token_ids": [1]}, "items"),
    ],
)
def test_what_cannot_be_scored(http: httpx.Client, body: dict, param: str) -> None:
    refused = http.post("/v1/score", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_vectors_come_while_others_generate(tokenizer_directory: Path) -> None:
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2000}, "stream": True}
    with (
        LiveServer(tokenizer_directory, lambda: FakeEngine(delay_s=0.01)) as live,
        httpx.stream("POST", f"{live.url}/generate", json=body, timeout=20) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        one = httpx.post(f"{live.url}/encode", json={"input_ids": [4, 2]}, timeout=20)
        assert one.json()["embedding"] == vector([4, 2])
        assert live.manager.inflight == 1

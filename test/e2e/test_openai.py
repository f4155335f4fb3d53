"""OpenAI's routes, by OpenAI's client. The engine repeats the prompt, so answers are known."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from test.kit.live_server import LiveServer

TEXT = "Ä 你好 fox"


def test_completion(client: openai.OpenAI, live: LiveServer) -> None:
    count = len(live.manager.tokenizer.encode(TEXT))
    answer = client.completions.create(model="test-model", prompt=TEXT, max_tokens=count)
    (choice,) = answer.choices
    assert choice.text == TEXT
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens == count
    assert answer.id.startswith("cmpl-")
    assert answer.model == "test-model"


def test_completion_stream_equals_whole(client: openai.OpenAI) -> None:
    options = {"model": "default", "prompt": TEXT, "max_tokens": 40}
    whole = client.completions.create(**options).choices[0].text
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_chunk_only_where_wanted(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="default",
            prompt="abc",
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_many_prompts_many_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt=["A", "B", "C"], n=2, max_tokens=3, seed=1
    )
    assert [c.text for c in answer.choices] == ["AAA", "AAA", "BBB", "BBB", "CCC", "CCC"]
    assert [c.index for c in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 18


def test_streamed_choices_are_told_apart(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in client.completions.create(
        model="default", prompt=["A", "B", "C"], max_tokens=9, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["A" * 9, "B" * 9, "C" * 9]


def test_prompt_of_ids(client: openai.OpenAI, live: LiveServer) -> None:
    ids = live.manager.tokenizer.encode(TEXT)
    answer = client.completions.create(model="default", prompt=ids, max_tokens=len(ids))
    assert answer.choices[0].text == TEXT


def test_stop_string(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt="ABCDEFGH", max_tokens=500, stop=["EF", "XY"]
    )
    assert answer.choices[0].text == "ABCD"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"matched_stop": "EF"}


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt="ABC", max_tokens=2, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == "ABCAB"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("ABCAB")
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[1]["B"] == -0.5


def test_echo_of_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt="ABC", max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "ABC"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or []) == 3


def test_chat(client: openai.OpenAI, live: LiveServer) -> None:
    answer = client.chat.completions.create(
        model="test-model",
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    prompt = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokenizer = live.manager.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert choice.message.content == tokenizer.decode(ids[:12])
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 12
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert choice.logprobs.content[0].bytes == list(b"<|im_start|>")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def test_chat_stream_equals_whole(client: openai.OpenAI) -> None:
    options = {
        "model": "default",
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 50,
        "n": 2,
    }
    whole = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    texts, ends, roles = ["", ""], [None, None], [None, None]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            roles[choice.index] = roles[choice.index] or choice.delta.role
            texts[choice.index] += choice.delta.content or ""
            assert ends[choice.index] is None
            ends[choice.index] = choice.finish_reason
    assert texts == whole
    assert ends == ["length", "length"]
    assert roles == ["assistant", "assistant"]


def test_chat_without_limit_fills_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "x"}]
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4096


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["test-model"]
    assert client.models.retrieve("test-model").id == "test-model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_errors_as_the_client_reads_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="default", prompt="x", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="x")
    assert missing.value.param == "model"


def test_raw_stream_format(http: httpx.Client) -> None:
    body = {"prompt": "AB", "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["choices"][0]["text"] == "A"


def test_unknown_options_are_named(http: httpx.Client) -> None:
    body = {"prompt": "AB", "max_tokens": 1, "user": "me", "wibble": 1, "service_tier": "auto"}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-sps-ignored"] == "wibble"


def test_unused_unsupported_options_pass(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "regex": None,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert "x-sps-ignored" not in response.headers


def test_request_id_is_given_back(http: httpx.Client) -> None:
    for given, back in (("abc-1", "abc-1"), ("bad id", None)):
        response = http.post(
            "/v1/completions",
            json={"prompt": "A", "max_tokens": 1},
            headers={"x-request-id": given},
        )
        assert response.headers.get("x-request-id") == back

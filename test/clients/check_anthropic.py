"""The anthropic package against a server: ``python check_anthropic.py URL``."""

from __future__ import annotations

import sys
from typing import Any

import anthropic
from checks import run_all

ASK: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
SHORT: dict[str, Any] = {"model": "default", "max_tokens": 24, "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
        "required": ["town"],
        "additionalProperties": False,
    },
}


def check_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(messages=ASK, system="Be brief.", **SHORT)
    (block,) = answer.content
    assert block.type == "text" and answer.role == "assistant" and answer.id.startswith("msg_")
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.output_tokens <= 24


def check_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(messages=ASK, **SHORT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    (block,) = client.messages.create(messages=ASK, **SHORT).content
    assert block.type == "text" and text == block.text
    assert final.content[0].type == "text" and final.content[0].text == text


def check_stop_sequence(client: anthropic.Anthropic) -> None:
    options = {**SHORT, "max_tokens": 400, "stop_sequences": ["e"]}
    answer = client.messages.create(messages=ASK, **options)
    if answer.stop_reason == "stop_sequence":
        assert answer.stop_sequence == "e"
    assert all("e" not in block.text for block in answer.content if block.type == "text")


def check_tool(client: anthropic.Anthropic) -> None:
    options = {**SHORT, "max_tokens": 100, "messages": ASK, "tools": [TOOL]}
    choice: Any = {"type": "tool", "name": "weather"}
    answer = client.messages.create(**options, tool_choice=choice)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert call.input["town"] in ("Rome", "Oslo") and answer.stop_reason == "tool_use"
    with client.messages.stream(**options, tool_choice=choice) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [call.input]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    talk = [
        *ASK,
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**{**options, "messages": talk}).content


def check_count(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(messages=ASK, model="default").input_tokens
    assert counted == client.messages.create(messages=ASK, **SHORT).usage.input_tokens


def check_error(client: anthropic.Anthropic) -> None:
    try:
        client.messages.create(messages=ASK, **{**SHORT, "model": "claude"})
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    else:
        raise AssertionError("an unknown model was accepted")


if __name__ == "__main__":
    print("anthropic", anthropic.__version__)
    run_all(globals(), anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0))

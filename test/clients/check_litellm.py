"""litellm against a server, by three of its providers: ``python check_litellm.py URL``."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from typing import Any, Literal

import litellm
from checks import run_all
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]


TALK = [{"role": "user", "content": "Ada is glad. How is the weather in Rome?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["town"],
        },
    },
}


def providers(url: str) -> tuple[dict[str, Any], ...]:
    """How litellm is told of the server: as OpenAI's, as a hosted vLLM, as Anthropic's."""
    short = {"api_key": "none", "max_tokens": 24, "temperature": 0, "num_retries": 0}
    return (
        {"model": "openai/default", "api_base": f"{url}/v1", **short},
        {"model": "hosted_vllm/default", "api_base": f"{url}/v1", **short},
        {"model": "anthropic/default", "api_base": url, **short},
    )


def check_completion(url: str) -> str:
    for options in providers(url):
        answer = litellm.completion(messages=TALK, **options)
        assert isinstance(answer.choices[0].message.content, str), options
        assert 0 < answer.usage.completion_tokens <= 24
    return ", ".join(options["model"] for options in providers(url))


def check_stream(url: str) -> None:
    for options in providers(url):
        whole = litellm.completion(messages=TALK, **options).choices[0].message.content
        pieces = litellm.completion(messages=TALK, stream=True, **options)
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole, options


def check_asynchronous(url: str) -> None:
    options = providers(url)[0]
    answer = asyncio.run(litellm.acompletion(messages=TALK, **options))
    assert answer.choices[0].finish_reason in ("stop", "length")


def check_structured_output(url: str) -> None:
    options = {**providers(url)[1], "max_tokens": 100}
    answer = litellm.completion(messages=TALK, response_format=Person, **options)
    Person.model_validate_json(answer.choices[0].message.content)


def check_tools(url: str) -> None:
    chosen = {"type": "function", "function": {"name": "weather"}}
    for options in providers(url):
        told = {**options, "max_tokens": 100, "tools": [TOOL], "tool_choice": chosen}
        (call,) = litellm.completion(messages=TALK, **told).choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo"), options


def check_text_completion(url: str) -> None:
    options = {**providers(url)[1], "model": "text-completion-openai/default"}
    answer = litellm.text_completion(prompt="Once upon a time", **options)
    assert isinstance(answer.choices[0].text, str)


def check_error(url: str) -> None:
    try:
        litellm.completion(messages=TALK, **{**providers(url)[0], "max_tokens": 10**9})
    except litellm.BadRequestError:
        return
    raise AssertionError("a billion tokens were accepted")


if __name__ == "__main__":
    print("litellm", importlib.metadata.version("litellm"))
    litellm.suppress_debug_info = True
    run_all(globals(), sys.argv[1])

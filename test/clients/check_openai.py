"""The openai package against a server: ``python check_openai.py URL``."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from checks import run_all
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
ASK: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 24}


def check_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id).id == model.id


def check_completion(client: openai.OpenAI) -> None:
    options = {**GREEDY, "prompt": "Once upon a time", "seed": 1}
    whole = client.completions.create(**options)
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 24
    pieces = client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *events, last = list(pieces)
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    assert last.choices == [] and last.usage == whole.usage


def check_logprobs_of_the_prompt(client: openai.OpenAI) -> None:
    options = {**GREEDY, "max_tokens": 0, "echo": True, "logprobs": 2}
    (choice,) = client.completions.create(prompt="The sky is blue.", **options).choices
    scores = choice.logprobs
    assert scores is not None and choice.text == "The sky is blue."
    assert scores.token_logprobs is not None and scores.token_logprobs[0] is None
    assert all(value < 0 for value in scores.token_logprobs[1:]) and scores.top_logprobs


def check_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=ASK, n=2, logprobs=True, top_logprobs=3, **GREEDY
    )
    first, second = answer.choices
    assert first.message.content == second.message.content
    assert first.logprobs is not None and first.logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in first.logprobs.content)


def check_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=ASK, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    whole = client.chat.completions.create(messages=ASK, **GREEDY)
    assert text == final.choices[0].message.content == whole.choices[0].message.content


def check_structured_output(client: openai.OpenAI) -> None:
    options = {**GREEDY, "max_tokens": 100}
    answer = client.chat.completions.parse(messages=ASK, response_format=Person, **options)
    assert isinstance(answer.choices[0].message.parsed, Person)
    text = client.chat.completions.create(
        messages=ASK,
        response_format={"type": "json_object"},
        model="default",
        temperature=0,
        max_tokens=100,
    )
    if text.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text.choices[0].message.content or ""), dict)


def check_tools(client: openai.OpenAI) -> None:
    options = {**GREEDY, "max_tokens": 100, "messages": ASK, "tools": [TOOL]}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(
            **options, tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo")
        assert answer.choices[0].finish_reason == "tool_calls"
    automatic = client.chat.completions.create(**options, tool_choice="auto")
    assert automatic.choices[0].message.content is not None


def check_tool_results(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    talk = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = client.chat.completions.create(messages=talk, tools=[TOOL], **GREEDY)
    assert answer.choices[0].message.content is not None


def check_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="default", input="Say hello.", max_output_tokens=16)
    assert first.output_text and first.usage is not None
    second = client.responses.create(
        model="default", input="Again.", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.usage is not None and second.usage.input_tokens > first.usage.input_tokens
    parsed = client.responses.parse(
        model="default", input="Who?", text_format=Person, max_output_tokens=100
    )
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(
        model="default", input="Who?", text_format=Person, max_output_tokens=100
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text


def check_errors(client: openai.OpenAI) -> None:
    for options, wanted in (
        ({**GREEDY, "max_tokens": 10**9}, openai.BadRequestError),
        ({**GREEDY, "model": "gpt-5"}, openai.NotFoundError),
    ):
        try:
            client.chat.completions.create(messages=ASK, **options)
        except wanted:
            continue
        raise AssertionError(f"no {wanted.__name__}")


def check_many_at_once(client: openai.OpenAI) -> None:
    async def ask() -> list[str | None]:
        many = openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none")
        calls = [many.chat.completions.create(messages=ASK, **GREEDY) for _ in range(16)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    answers = asyncio.run(ask())
    assert len(answers) == 16 and all(isinstance(answer, str) for answer in answers)


if __name__ == "__main__":
    print("openai", openai.__version__)
    run_all(globals(), openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0))

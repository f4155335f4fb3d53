"""Anthropic's routes, by Anthropic's client, over an engine that says what a model would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from test.kit import tokenizers as kinds
from test.kit.script import Script, Scripted, scripted_server

from sps_runtime.server.auth import Keys

TEMPLATE = (
    "{% if tools %}TOOLS{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments }}]"
    "{% endfor %}{% if m.name %}({{ m.name }}){% endif %}{% endfor %}"
)
TOOL: Any = {
    "name": "weather",
    "description": "Tells it",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
ASK: Any = [{"role": "user", "content": "How is it?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


class Anthropic(Scripted):
    def __init__(self, script: Script, live: Any) -> None:
        super().__init__(script, live)
        self.client = anthropic.Anthropic(
            base_url=live.url, api_key="none", max_retries=0, timeout=20
        )

    def options(self, answer: str, options: dict[str, Any]) -> dict[str, Any]:
        self.script.text = answer
        return {"messages": ASK, "model": "test-model", "max_tokens": 200, **options}

    def create(self, answer: str, **options: Any) -> Any:
        return self.client.messages.create(**self.options(answer, options))

    def stream(self, answer: str, **options: Any) -> Any:
        with self.client.messages.stream(**self.options(answer, options)) as stream:
            return stream.get_final_message()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anthropic")
    return kinds.write_directory(path, kinds.byte_level_tokenizer(), template=TEMPLATE)


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Anthropic]:
    script, live = scripted_server(directory, reasoning_parser="qwen3")
    with live:
        yield Anthropic(script, live)


def blocks(message: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for block in message.content:
        if block.type == "tool_use":
            found.append(("tool_use", block.name, block.input))
        else:
            found.append((block.type, getattr(block, block.type)))
    return found


CASES = [
    ("Just this.", [("text", "Just this.")], "end_turn"),
    ("", [], "end_turn"),
    ("<think>\nhm\n</think>\n\nSo.", [("thinking", "hm"), ("text", "So.")], "end_turn"),
    (
        f"<think>hm</think>Let me see.\n{CALL}\n{CALL}",
        [
            ("thinking", "hm"),
            ("text", "Let me see."),
            ("tool_use", "weather", {"city": "Zürich"}),
            ("tool_use", "weather", {"city": "Zürich"}),
        ],
        "tool_use",
    ),
]


@pytest.mark.parametrize(("answer", "expected", "reason"), CASES)
def test_answers_whole_and_streamed(
    server: Anthropic, answer: str, expected: list[Any], reason: str
) -> None:
    for ask in (server.create, server.stream):
        message = ask(answer, tools=[TOOL])
        assert blocks(message) == expected
        assert (message.stop_reason, message.stop_sequence) == (reason, None)
        assert message.role == "assistant" and message.id.startswith("msg_")
        assert message.usage.input_tokens == len(server.live.engine.requests[-1].tokens) // 4
        assert message.usage.output_tokens > 0


def test_other_ends(server: Anthropic) -> None:
    for ask in (server.create, server.stream):
        cut = ask("A long answer indeed", max_tokens=3)
        assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
        stopped = ask("one STOP two", stop_sequences=["STOP"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
        assert blocks(stopped) == [("text", "one ")]


def test_events_come_in_order(server: Anthropic) -> None:
    events = server.create(f"Well. {CALL}", tools=[TOOL], stream=True)
    kinds_seen = [event.type for event in events]
    assert kinds_seen[0] == "message_start" and kinds_seen[-2:] == ["message_delta", "message_stop"]
    starts = [kind for kind in kinds_seen if kind.startswith("content_block_st")]
    assert starts == ["content_block_start", "content_block_stop"] * 2
    assert kinds_seen.count("content_block_delta") > 5


def test_results_go_back(server: Anthropic) -> None:
    first = server.create(CALL, tools=[TOOL])
    (call,) = first.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [text("sunny")]}
    messages = [*ASK, {"role": "assistant", "content": first.content}]
    messages.append({"role": "user", "content": [result, text("And now?")]})
    final = server.create("Good.", messages=messages, tools=[TOOL], system=[text("Be kind.")])
    assert blocks(final) == [("text", "Good.")]
    assert server.prompt() == (
        "TOOLS weather<system>Be kind.<user>How is it?<assistant>"
        "[weather {'city': 'Zürich'}]<tool>sunny(weather)<user>And now?"
    )


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def test_choices_and_formats_are_grammars(server: Anthropic) -> None:
    def grammar() -> str:
        return str(server.live.engine.requests[-1].sampling.grammar)

    server.create("x", tools=[TOOL], tool_choice={"type": "auto"})
    assert not grammar()
    server.create("x", tools=[TOOL], tool_choice={"type": "any"})
    assert "weather" in grammar() and "*" in grammar()
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    server.create("x", tools=[TOOL], tool_choice=choice)
    assert "weather" in grammar() and "marked)*" not in grammar()
    server.create(CALL, tools=[TOOL], tool_choice={"type": "none"})
    assert not grammar() and "TOOLS" not in server.prompt()
    form: Any = {"type": "json_schema", "schema": TOOL["input_schema"]}
    server.create("{}", output_config={"format": form})
    assert "city" in grammar()


def test_count_tokens(server: Anthropic) -> None:
    options: Any = {"messages": ASK, "model": "test-model", "tools": [TOOL], "system": "Be kind."}
    count = server.client.messages.count_tokens(**options).input_tokens
    assert server.create("x", **options).usage.input_tokens == count > 10


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "I"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"extra_body": {"mcp_servers": [{"url": "u"}]}}, "mcp_servers"),
        ({"extra_body": {"output_config": {"effort": "high"}}}, "output_config"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)
def test_refused_by_name(server: Anthropic, options: dict[str, Any], field: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        server.create("x", **options)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert field in body["error"]["message"]


def test_errors_have_their_types(server: Anthropic, directory: Path) -> None:
    with pytest.raises(anthropic.NotFoundError):
        server.create("x", model="another")
    script, live = scripted_server(directory)
    live._keys = Keys(user_hashes=["00" * 32])
    with live, pytest.raises(anthropic.AuthenticationError):
        Anthropic(script, live).create("x")


def test_a_stream_that_fails_says_so(directory: Path) -> None:
    script, live = scripted_server(directory)
    with live:
        live.engine.delay_s = 0.02
        stream = Anthropic(script, live).create("slow " * 50, stream=True)
        live.call(live.engine.fail)
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
            list(stream)


def test_unknown_options_are_named(server: Anthropic) -> None:
    body = {"model": "test-model", "max_tokens": 3, "messages": ASK, "wibble": 1, "metadata": {}}
    answer = httpx.post(f"{server.live.url}/v1/messages", json=body)
    assert answer.status_code == 200 and answer.headers["x-sps-ignored"] == "wibble"

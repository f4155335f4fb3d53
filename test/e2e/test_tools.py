"""Tools and reasoning through OpenAI's client, by an engine that says what a model would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from test.kit import tokenizers as kinds
from test.kit.script import Script, Scripted, scripted_server

from sps_runtime.grammar.backends import make_backend
from sps_runtime.grammar.protocol import Vocabulary

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }}"
    "{% for key in call.function.arguments %} {{ key }}{% endfor %}{% endfor %}{% endfor %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": "How is it?"}]
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Zürich"}}; '
    '{"name": "now", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich"}}, '
    '{"name": "now", "arguments": {}}]',
}
EXPECTED = [("weather", '{"city": "Zürich"}'), ("now", "{}")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools")
    return kinds.write_directory(path, kinds.byte_level_tokenizer(), template=TEMPLATE)


class Chat(Scripted):
    """A scripted server with OpenAI's client."""

    def __init__(self, script: Script, live: Any) -> None:
        super().__init__(script, live)
        self._client = openai.OpenAI(
            base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20
        )

    def chat(self, answer: str, **options: Any) -> Any:
        self.script.text = answer
        options = {"messages": ASK, "model": "test-model", **options}
        return self._client.chat.completions.create(**options)


@pytest.fixture(scope="module", params=list(CALLS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(directory: Path, form: str) -> Iterator[Chat]:
    script, live = scripted_server(directory, tool_call_parser=form, reasoning_parser="qwen3")
    with live:
        yield Chat(script, live)


def streamed(chunks: Any) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """Reasoning, text, calls and the end of a stream."""
    thought = text = ""
    calls: list[list[str]] = []
    end = None
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        thought += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                assert call.id and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        end = choice.finish_reason or end
    return thought, text, [(name, arguments) for name, arguments in calls], end


def whole(answer: Any) -> tuple[str, str, list[tuple[str, str]], str | None]:
    (choice,) = answer.choices
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return message.reasoning_content or "", message.content or "", calls, choice.finish_reason


@pytest.mark.parametrize("thought", ["", "I need it.\nYes."])
def test_calls_round_trip(server: Chat, form: str, thought: str) -> None:
    lead = "" if form == "llama3" else "Let me see. "
    answer = (f"<think>\n{thought}\n</think>\n\n" if thought else "") + lead + CALLS[form]
    expected = (thought, lead.strip(), EXPECTED, "tool_calls")
    assert whole(server.chat(answer, tools=TOOLS)) == expected
    assert streamed(server.chat(answer, tools=TOOLS, stream=True)) == expected


def test_the_next_turn_takes_calls_and_results(server: Chat, form: str) -> None:
    first = server.chat(CALLS[form], tools=TOOLS).choices[0].message
    assert first.content is None
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls
    ]
    turn = server.chat("Nice.", messages=[*ASK, first, *results], tools=TOOLS)
    assert whole(turn) == ("", "Nice.", [], "stop")
    prompt = server.prompt()
    assert prompt.startswith('TOOLS [{"type": "function", "function": {"name": "weather"')
    assert "CALL weather cityCALL now<tool>sunny<tool>sunny" in prompt, "arguments are an object"


def test_no_tools_no_calls(server: Chat, form: str) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = server.chat(CALLS[form], **options)
        assert whole(answer)[1:] == (CALLS[form], [], "stop")
        assert "TOOLS" not in server.prompt() and not server.grammar()


def test_a_cut_call_says_so(server: Chat, form: str) -> None:
    limit = len(server.script._tokenizer.encode(CALLS[form])) // 2
    for stream in (False, True):
        answer = server.chat(CALLS[form], tools=TOOLS, max_tokens=limit, stream=stream)
        found = streamed(answer) if stream else whole(answer)
        assert found[2][0][0] == "weather" and found[3] == "length"


def test_one_call_where_no_more_are_wanted(server: Chat, form: str) -> None:
    answer = server.chat(CALLS[form], tools=TOOLS, parallel_tool_calls=False)
    assert whole(answer)[2] == EXPECTED[:1]


@pytest.mark.parametrize(
    ("choice", "parallel", "accepted"),
    [
        ("required", True, [True, True, True, False]),
        ("required", False, [False, True, True, False]),
        ({"type": "function", "function": {"name": "now"}}, True, [False, False, True, False]),
    ],
)
def test_forced_calls_are_a_grammar(
    server: Chat, form: str, choice: Any, parallel: bool, accepted: list[bool]
) -> None:
    server.chat(
        CALLS[form], tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, max_tokens=2
    )
    answers = [CALLS[form], *singles(form), "Just text."]
    assert [follows(server.grammar(), answer) for answer in answers] == accepted


def test_strict_tools_keep_to_their_schemas(server: Chat, form: str) -> None:
    tool = json.loads(json.dumps(TOOLS[0]))
    server.chat("x", tools=[tool], max_tokens=2)
    assert not server.grammar()
    tool["function"]["strict"] = True
    server.chat("x", tools=[tool], max_tokens=2)
    assert follows(server.grammar(), "Just text.")
    if form == "hermes":
        assert follows(server.grammar(), "So " + singles(form)[0])
        bad = singles(form)[0].replace('"city"', '"town"')
        assert not follows(server.grammar(), bad)


def singles(form: str) -> list[str]:
    """Each of the two calls alone."""
    if form == "hermes":
        first, second = CALLS[form].split("\n<tool_call>")
        return [first, "<tool_call>" + second]
    if form == "llama3":
        return CALLS[form].split("; ")
    first, second = CALLS[form].removeprefix("[TOOL_CALLS][").removesuffix("]").split(", {")
    return [f"[TOOL_CALLS][{first}]", f"[TOOL_CALLS][{{{second}]"]


TOKENIZER = kinds.byte_level_tokenizer()
BACKEND = make_backend(
    "llguidance", Vocabulary(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), (2,))
)


def follows(grammar: str, answer: str) -> bool:
    matcher = BACKEND.matcher(grammar)
    for token in TOKENIZER.encode(answer).ids:
        if not matcher.allowed()[token]:
            return False
        matcher.accept([token])
    return bool(matcher.allowed()[2])


def test_what_cannot_be(server: Chat) -> None:
    for options, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format and tools",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            server.chat("x", **options)
        assert caught.value.param == param


def test_grammars_begin_after_reasoning(server: Chat, form: str) -> None:
    """The servers of this module read qwen3's reasoning, which is optional."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for options, answer in (
        ({"tools": TOOLS, "tool_choice": "required"}, singles(form)[0]),
        ({"response_format": schema}, '{"city": "Rom"}'),
        ({"extra_body": {"regex": r"[a-z]+/[0-9]\/\n?"}}, "ab/1/"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "yes"),
    ):
        server.chat(answer, max_tokens=2, **options)
        assert follows(server.grammar(), answer)
        assert follows(server.grammar(), f"<think>\nIs it {{}}?\n</think>\n\n{answer}")
        assert not follows(server.grammar(), "<think>hm</think>maybe")
        assert not follows(server.grammar(), "<think>never ends " + answer)
        assert not follows(server.grammar(), "Well, " + answer)


def test_opened_reasoning_must_be_closed(directory: Path) -> None:
    script, live = scripted_server(directory, reasoning_parser="deepseek-r1")
    with live:
        server = Chat(script, live)
        server.chat("x", max_tokens=2, response_format={"type": "json_object"})
        assert follows(server.grammar(), 'So.</think>\n{"a": 1}')
        assert not follows(server.grammar(), '{"a": 1}')


def test_reasoning_may_stay_in_the_text(server: Chat) -> None:
    answer = server.chat("<think>a</think>b", extra_body={"separate_reasoning": False})
    assert whole(answer)[:2] == ("", "<think>a</think>b")


def test_without_parsers(directory: Path) -> None:
    script, live = scripted_server(directory, tool_call_parser="none")
    with live:
        server = Chat(script, live)
        assert whole(server.chat("<think>a</think>b"))[:2] == ("", "<think>a</think>b")
        with pytest.raises(openai.BadRequestError) as caught:
            server.chat("x", tools=TOOLS)
        assert caught.value.code == "unsupported_option"

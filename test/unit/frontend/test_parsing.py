"""Reasoning and tool calls: every format, cut into pieces everywhere."""

from __future__ import annotations

import json
import random

import pytest

from sps_runtime.frontend.parsing.answer_parser import AnswerParser
from sps_runtime.frontend.parsing.events import CallArguments, CallBegin, Event, Reasoning, Text
from sps_runtime.frontend.parsing.reasoning import (
    REASONING_FORMATS,
    ReasoningParser,
    find_reasoning_format,
)
from sps_runtime.frontend.parsing.tool_formats import (
    HERMES,
    LLAMA3,
    MISTRAL,
    ToolFormat,
    find_tool_format,
)
from sps_runtime.frontend.parsing.tool_parser import ToolParser
from sps_runtime.types.errors import ConfigError

NAMES = ("add", "get_weather")
Found = tuple[str, str, list[tuple[str, str]]]


def gathered(events: list[Event]) -> Found:
    """Reasoning, text, and calls as (name, arguments)."""
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    text = "".join(event.text for event in events if isinstance(event, Text))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(calls) and event.id
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1, "calls come one after another"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return thought, text, calls


def parse(parser: AnswerParser, pieces: list[str]) -> Found:
    events = [event for piece in pieces for event in parser.push(piece)]
    return gathered(events + parser.finish())


def tools(form: ToolFormat, most: int = 99) -> AnswerParser:
    return AnswerParser(tools=ToolParser(form, NAMES, most))


ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}\\"{"}]}}'
ADD_ARGUMENTS = '{"a": 1, "b": [2, {"c": "}\\"{"}]}'
WEATHER = '{"arguments": {"city": "Zürich"}, "name": "get_weather"}'
WEATHER_ARGUMENTS = '{"city": "Zürich"}'
LLAMA_ADD = '{"type": "function", "name": "add", "parameters": {"a": 1}}'
BOTH = [("add", ADD_ARGUMENTS), ("get_weather", WEATHER_ARGUMENTS)]
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "no call < here <tool", "no call < here <tool", []),
    (HERMES, "blanks stay \n\n", "blanks stay \n\n", []),
    (HERMES, f"<tool_call>\n{ADD}\n</tool_call>", "", BOTH[:1]),
    (HERMES, f"I add.\n\n<tool_call>{ADD}</tool_call>\n", "I add.", BOTH[:1]),
    (
        HERMES,
        f"So:\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call> done. ",
        "So:done.",
        BOTH,
    ),
    (HERMES, f"<tool_call>\n[{ADD}, {WEATHER}]\n</tool_call>", "", BOTH),
    (HERMES, f"<tool_call>{ADD}", "", BOTH[:1]),
    (HERMES, f"<tool_call>{ADD}</tool", "", BOTH[:1]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    (HERMES, "a <tool_call>not JSON</tool_call> b", "a <tool_call>not JSON</tool_call> b", []),
    (HERMES, '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    (HERMES, '<tool_call>{"arguments": {}}', '<tool_call>{"arguments": {}}', []),
    (HERMES, "<tool_call></tool_call>x", "<tool_call></tool_call>x", []),
    (HERMES, '<tool_call>{"na', '<tool_call>{"na', []),
    (LLAMA3, LLAMA_ADD, "", [("add", '{"a": 1}')]),
    (LLAMA3, f"<|python_tag|>{LLAMA_ADD}; {LLAMA_ADD}", "", [("add", '{"a": 1}')] * 2),
    (LLAMA3, f" {LLAMA_ADD}\nand so", "and so", [("add", '{"a": 1}')]),
    (LLAMA3, 'Look: {"name": "add"}', 'Look: {"name": "add"}', []),
    (LLAMA3, '{"color": "red"} {"x": 1}', '{"color": "red"} {"x": 1}', []),
    (LLAMA3, "{curly} text", "{curly} text", []),
    (MISTRAL, f"[TOOL_CALLS] [{ADD}, {WEATHER}]", "", BOTH),
    (MISTRAL, f"ok [TOOL_CALLS]{ADD}", "ok", BOTH[:1]),
    (MISTRAL, f"[TOOL_CALLS]add[ARGS]{ADD_ARGUMENTS}", "", BOTH[:1]),
    (
        MISTRAL,
        f"[TOOL_CALLS]add{ADD_ARGUMENTS}[TOOL_CALLS]get_weather[ARGS]{WEATHER_ARGUMENTS}",
        "",
        BOTH,
    ),
    (MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", None, []),
    (MISTRAL, "[1, 2] [TOOL", "[1, 2] [TOOL", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), CASES)
def test_tool_calls_however_they_are_cut(
    form: ToolFormat, answer: str, text: str | None, calls: list[tuple[str, str]]
) -> None:
    expected = ("", answer if text is None else text, calls)
    assert parse(tools(form), [answer]) == expected
    assert parse(tools(form), list(answer)) == expected
    chance = random.Random(0)
    for _ in range(50):
        cuts = sorted(chance.sample(range(len(answer) + 1), min(4, len(answer))))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert parse(tools(form), pieces) == expected, pieces
    for _, arguments in calls:
        json.loads(arguments)


def test_arguments_stream_while_they_are_written() -> None:
    parser = tools(HERMES)
    events = parser.push('<tool_call>\n{"name": "add", "arguments": {"a": 1')
    assert gathered(events)[2] == [("add", '{"a": 1')]
    events = parser.push("2")
    assert events == [CallArguments(0, "2")]
    assert parser.calls == 1


def test_text_streams_but_for_what_may_be_a_marker() -> None:
    parser = tools(HERMES)
    assert gathered(parser.push("Hello <tool"))[1] == "Hello"
    assert gathered(parser.push("box> it"))[1] == " <toolbox> it"


def test_calls_beyond_the_most_are_dropped() -> None:
    answer = f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>"
    assert parse(tools(HERMES, most=1), list(answer)) == ("", "", BOTH[:1])


def test_ids_are_of_the_formats_kind() -> None:
    parser = ToolParser(MISTRAL, NAMES)
    begin = parser.push(f"[TOOL_CALLS][{ADD}]")[0]
    assert isinstance(begin, CallBegin) and len(begin.id) == 9 and begin.id.isalnum()
    begin = ToolParser(HERMES, NAMES).push(f"<tool_call>{ADD}")[0]
    assert isinstance(begin, CallBegin) and begin.id.startswith("call_")


REASONING = [
    ("deepseek-r1", "I think.\n</think>\n\nAnswer", "I think.", "Answer"),
    ("deepseek-r1", "<think>\nI think</think>A", "I think", "A"),
    ("deepseek-r1", "never ends </thi", "never ends </thi", ""),
    ("qwen3", "<think>\nhm\n\nhm\n</think>\n\nA </think>", "hm\n\nhm", "A </think>"),
    ("qwen3", "<think>\n\n</think>\n\nA", "", "A"),
    ("qwen3", "No <think> here", "", "No <think> here"),
    ("qwen3", "  <thin", "", "  <thin"),
    ("qwen3-thinking", "x</think>", "x", ""),
]


@pytest.mark.parametrize(("name", "answer", "thought", "text"), REASONING)
def test_reasoning_however_it_is_cut(name: str, answer: str, thought: str, text: str) -> None:
    for pieces in ([answer], list(answer), [answer[:7], answer[7:]]):
        parser = AnswerParser(reasoning=ReasoningParser(REASONING_FORMATS[name]))
        assert parse(parser, pieces) == (thought, text, []), pieces


def test_calls_after_reasoning() -> None:
    answer = f"<think>Is <tool_call> right?</think>\n\n<tool_call>{ADD}</tool_call>"
    for pieces in ([answer], list(answer)):
        reasoning = ReasoningParser(REASONING_FORMATS["qwen3"])
        parser = AnswerParser(reasoning, ToolParser(HERMES, NAMES))
        assert parse(parser, pieces) == ("Is <tool_call> right?", "", BOTH[:1])


def test_formats_by_name_and_by_template() -> None:
    assert find_tool_format("qwen25", "") is HERMES
    assert find_tool_format("none", "<tool_call>") is None
    assert find_tool_format("", "x <|python_tag|> y") is LLAMA3
    assert find_tool_format("", "[TOOL_CALLS]") is MISTRAL
    assert find_tool_format("", "") is HERMES
    assert find_reasoning_format("") is None
    for find in (lambda: find_tool_format("x", ""), lambda: find_reasoning_format("x")):
        with pytest.raises(ConfigError, match="known"):
            find()

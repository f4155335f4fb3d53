"""/v1/responses, by OpenAI's client, over an engine that says what a model would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from test.kit import tokenizers as kinds
from test.kit.script import Script, Scripted, scripted_server

from sps_runtime.server.responses_store import ResponseStore, StoredResponse
from sps_runtime.types.errors import InvalidRequest

TEMPLATE = (
    "{% for t in tools or [] %}TOOL {{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments }}]"
    "{% endfor %}{% if m.name %}({{ m.name }}){% endif %}{% endfor %}"
)
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells it",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": None,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


class Responses(Scripted):
    def __init__(self, script: Script, live: Any) -> None:
        super().__init__(script, live)
        self.client = openai.OpenAI(
            base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20
        )

    def ask(self, answer: str, given: Any = "Hi", **options: Any) -> Any:
        self.script.text = answer
        return self.client.responses.create(input=given, model="test-model", **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("responses")
    return kinds.write_directory(path, kinds.byte_level_tokenizer(), template=TEMPLATE)


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Responses]:
    script, live = scripted_server(directory, reasoning_parser="qwen3")
    with live:
        yield Responses(script, live)


def items(response: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append(("call", item.name, json.loads(item.arguments)))
        else:
            found.append((item.type, "".join(part.text for part in item.content)))
    return found


CASES = [
    ("Just this.", [("message", "Just this.")]),
    ("", []),
    ("<think>\nhm\n</think>\n\nSo.", [("reasoning", "hm"), ("message", "So.")]),
    (
        f"<think>hm</think>Let me see.\n{CALL}\n{CALL}",
        [
            ("reasoning", "hm"),
            ("message", "Let me see."),
            ("call", "weather", {"city": "Zürich"}),
            ("call", "weather", {"city": "Zürich"}),
        ],
    ),
]


@pytest.mark.parametrize(("answer", "expected"), CASES)
def test_answers_whole_and_streamed(server: Responses, answer: str, expected: list[Any]) -> None:
    whole = server.ask(answer, tools=[TOOL])
    assert items(whole) == expected and whole.status == "completed"
    assert whole.output_text == "".join(text for kind, text, *_ in expected if kind == "message")
    assert whole.usage.input_tokens == len(server.live.engine.requests[-1].tokens) // 4
    events = list(server.ask(answer, tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed" and items(events[-1].response) == expected
    spoken = "".join(event.delta for event in events if event.type.endswith(".delta"))
    told = [
        item.arguments if item.type == "function_call" else item.content[0].text
        for item in whole.output
    ]
    assert spoken == "".join(told)
    for index, item in enumerate(events[-1].response.output):
        kinds_seen = [e.type for e in events if getattr(e, "output_index", None) == index]
        assert kinds_seen[0] == "response.output_item.added"
        assert kinds_seen[-1] == "response.output_item.done"
        done = [e for e in events if e.type == "response.output_item.done"][index]
        assert done.item.id == item.id and done.item.status == "completed"


def test_the_clients_own_accumulator_agrees(server: Responses) -> None:
    server.script.text = f"Let me see. {CALL}"
    with server.client.responses.stream(input="Hi", model="test-model", tools=[TOOL]) as stream:
        list(stream)
        final = stream.get_final_response()
    assert items(final) == [("message", "Let me see."), ("call", "weather", {"city": "Zürich"})]


def test_a_cut_answer_is_incomplete(server: Responses) -> None:
    for stream in (False, True):
        response = server.ask("A long answer indeed", max_output_tokens=3, stream=stream)
        if stream:
            last = list(response)[-1]
            assert last.type == "response.incomplete"
            response = last.response
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on(server: Responses, stream: bool) -> None:
    def settled(response: Any) -> Any:
        return list(response)[-1].response if stream else response

    first = settled(server.ask(CALL, instructions="Be kind.", tools=[TOOL], stream=stream))
    assert server.prompt() == "TOOL weather <system>Be kind.<user>Hi"
    result = {
        "type": "function_call_output",
        "call_id": first.output[0].call_id,
        "output": "sunny",
    }
    second = settled(server.ask("Good.", [result], previous_response_id=first.id, stream=stream))
    assert server.prompt() == "<user>Hi<assistant>[weather {'city': 'Zürich'}]<tool>sunny(weather)"
    server.ask("Bye.", "Thanks", previous_response_id=second.id)
    assert server.prompt().endswith("<tool>sunny(weather)<assistant>Good.<user>Thanks")
    found = server.client.responses.retrieve(first.id)
    assert items(found) == items(first)
    server.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask("x", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


def test_unstored_responses_are_forgotten(server: Responses) -> None:
    response = server.ask("x", store=False)
    with pytest.raises(openai.BadRequestError):
        server.ask("x", previous_response_id=response.id)


def test_items_instead_of_a_store(server: Responses) -> None:
    first = server.ask(f"See: {CALL}", tools=[TOOL])
    given = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    given += [item.model_dump(exclude_none=True) for item in first.output]
    given.append(
        {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "sunny"}
    )
    server.ask("Good.", given)
    assert server.prompt() == (
        "<user>Hi<assistant>See:[weather {'city': 'Zürich'}]<tool>sunny(weather)"
    )


def test_other_servers_sampling_options_are_honoured(server: Responses) -> None:
    told = {"ignore_eos": True, "stop": None, "seed": 7, "top_k": 3, "min_tokens": 2}
    server.ask("Well", extra_body=told, max_output_tokens=9)
    sampling = server.live.engine.requests[-1].sampling
    assert (sampling.ignore_eos, sampling.top_k, sampling.max_new_tokens) == (True, 3, 9)
    assert (sampling.seed, sampling.min_new_tokens) == (7, 2)
    assert server.ask("One, two, three", extra_body={"stop": ", three"}).output_text == "One, two"


def test_formats_and_choices_are_grammars(server: Responses) -> None:
    server.ask("x", text={"format": {"type": "text"}})
    assert not server.grammar()
    server.ask("{}", text={"format": {"type": "json_object"}})
    assert "object" in server.grammar()
    schema = {"type": "json_schema", "name": "x", "schema": TOOL["parameters"]}
    assert server.ask("{}", text={"format": schema}).text.format.name == "x"
    assert "city" in server.grammar()
    choice: Any = {"type": "function", "name": "weather"}
    server.ask(CALL, tools=[TOOL], tool_choice=choice)
    assert "weather" in server.grammar()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"given": []}, "input"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"given": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"text": {"verbosity": "low"}}, "text"),
    ],
)
def test_refused_by_name(server: Responses, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask("x", **options)
    assert str(caught.value.param).startswith(param)


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_chars=100, max_responses=3)
    for number in range(10):
        store.put("me", f"r{number}", StoredResponse((), {"id": f"r{number}"}, 30))
    assert store.get("me", "r9", field="x", status=400).content["id"] == "r9"
    for owner, name in (("me", "r0"), ("me", "r6"), ("you", "r9")):
        with pytest.raises(InvalidRequest):
            store.get(owner, name, field="x", status=404)
    store.put("me", "big", StoredResponse((), {}, 99))
    with pytest.raises(InvalidRequest):
        store.get("me", "r9", field="x", status=404)

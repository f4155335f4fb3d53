"""Every way to write a grammar over HTTP, and every way to write it wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from test.kit.live_server import LiveServer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<a>", "schema": {"type": "integer"}, "end": "</a>"}],
    "triggers": ["<a>"],
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def grammar_of_last(live: LiveServer) -> str:
    return live.engine.requests[-1].sampling.grammar


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("regex", "[0-9]+", "[0-9]+"),
        ("json_schema", json.dumps(SCHEMA), "properties"),
        ("ebnf", 'root ::= "yes"', "yes"),
        ("structural_tag", json.dumps(TAG), "TAG_TEXT"),
        ("regex", None, ""),
        ("regex", "", ""),
    ],
)
def test_native(live: LiveServer, http: httpx.Client, field: str, value: Any, told: str) -> None:
    body = {"text": "abc", "sampling_params": {field: value, "max_new_tokens": 2}}
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert told in grammar_of_last(live) and bool(told) == bool(grammar_of_last(live))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"response_format": {"type": "text"}}, ""),
        ({"response_format": {"type": "json_object"}}, '"object"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "properties",
        ),
        ({"response_format": TAG}, "TAG_TEXT"),
        ({"regex": "[0-9]+"}, "[0-9]+"),
        ({"ebnf": 'root ::= "yes"'}, "yes"),
        ({"json_schema": json.dumps(SCHEMA)}, "properties"),
        ({"guided_json": SCHEMA}, "properties"),
        ({"guided_regex": "[0-9]+"}, "[0-9]+"),
        ({"guided_choice": ["yes", 'n"o']}, "yes"),
        ({"guided_grammar": 'start: "yes"'}, "yes"),
        ({"structured_outputs": {"json": SCHEMA}}, "properties"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "start"),
        ({"structured_outputs": {"json_object": True}}, '"object"'),
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_openai(
    live: LiveServer, http: httpx.Client, route: str, options: dict[str, Any], told: str
) -> None:
    body = CHAT if "chat" in route else {"prompt": "Hi", "max_tokens": 3}
    answer = http.post(route, json={**body, **options})
    assert answer.status_code == 200, answer.text
    assert told in grammar_of_last(live) and bool(told) == bool(grammar_of_last(live))
    assert "x-sps-ignored" not in answer.headers


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"regex": "(a"}, "regex"),
        ({"regex": "a" * 70_000}, "regex"),
        ({"regex": 5}, "regex"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "regex and ebnf"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, None),
        ({"structured_outputs": {"whitespace_pattern": " "}}, None),
    ],
)
def test_refused(http: httpx.Client, options: dict[str, Any], param: str | None) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **options})
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_refused_native(http: httpx.Client) -> None:
    for sampling, param in (
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"regex": "a", "json_schema": "{}"}, "sampling_params.regex and"),
        ({"stop_regex": "a$"}, "sampling_params.stop_regex"),
        ({"stop_regex": ["a", "(b"]}, "sampling_params.stop_regex"),
        ({"stop_regex": "a{300}"}, "sampling_params.stop_regex"),
    ):
        answer = http.post("/generate", json={"text": "a", "sampling_params": sampling})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)

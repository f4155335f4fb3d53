"""Requests that must be refused: path, body and the field that the answer must name ("" for none).

The kinds are those that have hurt users of other servers. A body given as bytes is sent as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from test.kit.live_server import VOCAB_SIZE

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
VECTORS, SCORE = "/v1/embeddings", "/v1/score"
USER = [{"role": "user", "content": "x"}]

# name -> values that must be refused, in OpenAI's words
SAMPLING: dict[str, list[Any]] = {
    "max_tokens": [-1, 1 << 31, 1 << 70, "5", 1.5, True, [1]],
    "min_tokens": [-1, 5, "1"],
    "temperature": [-0.1, 101, "1", True, [1], {}],
    "top_p": [0, 2, -1, "1"],
    "top_k": [-2, 1 << 31, 1.5, "1"],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [2.5, -2.5, "0"],
    "frequency_penalty": [2.5, -2.5],
    "repetition_penalty": [0, 2.5, -1],
    "n": [0, 17, 1 << 31, -1, "1", True],
    "seed": [1 << 64, 1.5, "1"],
    "stop": [["x"] * 17, "", [""], "x" * 257, 5, [5], {"a": 1}],
    "stop_regex": [["x"] * 17, "", [""], "x" * 257, 5, "a(", "(?=a)b", r"(a)\1", "a{300}", "a*"],
    "stop_token_ids": [[VOCAB_SIZE], [-1], [True], [1.0], [1 << 63], ["1"], 5, [1] * 301],
    "logit_bias": [
        {str(VOCAB_SIZE): 1},
        {"-1": 1},
        {"x": 1},
        {"1": 101},
        {"1": "1"},
        {str(i): 1 for i in range(301)},
        [1],
    ],
    "stream": ["yes", 1],
    "stream_options": [5, "x"],
}
NATIVE_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}
PROMPTS: list[Any] = [
    "",
    [],
    [[]],
    [""],
    [VOCAB_SIZE],
    [-1],
    [True],
    [1.0],
    [1 << 63],
    [1, "x"],
    ["x", 1],
    [[1], [VOCAB_SIZE]],
    [[[1]]],
    [None],
    "y " * 9000,
    [5] * 4097,
    ["x"] * 65,
    5,
    {"a": 1},
    True,
]
UNSUPPORTED: dict[str, Any] = {
    "regex": "a(",
    "json_schema": "{",
    "ebnf": "root ::= x",
    "lora_path": "/etc/passwd",
    "session_params": {"id": 1},
    "custom_logit_processor": "x",
    "image_data": "http://example.com/x.png",
    "return_hidden_states": True,
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "guided_json": {"type": "nothing"},
    "structural_tag": "x",
}
OPENAI_UNSUPPORTED: dict[str, Any] = {
    "best_of": 3,
    "suffix": "x",
    "tools": [{"type": "function", "function": {"name": "f g"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_schema"},
    "chat_template": "{{ ().__class__ }}",
    "reasoning_effort": "high",
    "modalities": ["text", "audio"],
}
MESSAGES: list[tuple[Any, str]] = [
    ([], "messages"),
    (None, "messages"),
    ("x", "messages"),
    ([5], "messages[0]"),
    ([{"role": "wizard", "content": "x"}], "messages[0].role"),
    ([{"role": "tool"}], "messages[0].content"),
    (
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
        "messages[0]",
    ),
    ([{"content": "x"}], "messages[0]"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
        "messages[0].content[0].type",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "messages[0].content[0].type"),
    (
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        "messages[0].tool_calls",
    ),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], "messages[0].tool_calls"),
    ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "messages[0]"),
    ([{"role": "user", "content": "y " * 9000}], "messages"),
]

TOOLS: list[tuple[Any, str]] = [
    ("x", "tools"),
    ([{"type": "retrieval"}], "tools[0]"),
    ([{"type": "function"}], "tools[0]"),
    ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
    ([{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)], "tools"),
    ([{"type": "function", "function": {"name": "f"}}] * 2, "tools"),
    ([{"type": "function", "function": {"name": "f", "parameters": 5}}], "tools[0]"),
]


def sampling_cases() -> Iterator[tuple[str, Any, str]]:
    for name, values in SAMPLING.items():
        for value in values:
            yield TEXT, {"prompt": "x", "max_tokens": 4, name: value}, name
            yield CHAT, {"messages": USER, "max_tokens": 4, name: value}, name
            if not name.startswith("stream"):
                native = NATIVE_NAMES.get(name, name)
                sampling = {"max_new_tokens": 4, native: value}
                yield (
                    NATIVE,
                    {"text": "x", "sampling_params": sampling},
                    f"sampling_params.{native}",
                )


def prompt_cases() -> Iterator[tuple[str, Any, str]]:
    for prompt in PROMPTS:
        yield TEXT, {"prompt": prompt, "max_tokens": 1}, "prompt"
        ids = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)
        yield NATIVE, {"input_ids" if ids else "text": prompt}, "input_ids" if ids else "text"
    yield TEXT, {"max_tokens": 1}, "prompt"
    yield NATIVE, {}, "input_ids"
    yield NATIVE, {"text": "x", "input_ids": [1]}, "input_ids"
    yield TEXT, {"prompt": ["x"] * 33, "n": 2}, "n"
    yield TEXT, {"prompt": [5] * 4090, "max_tokens": 10}, "max_tokens"


def other_cases() -> Iterator[tuple[str, Any, str]]:
    for messages, field in MESSAGES:
        yield CHAT, {"messages": messages, "max_tokens": 1}, field
    yield CHAT, {"max_tokens": 1}, ""
    for name, value in UNSUPPORTED.items():
        yield TEXT, {"prompt": "x", name: value}, name
        yield CHAT, {"messages": USER, name: value}, name
        yield NATIVE, {"text": "x", name: value}, name
    for name, value in OPENAI_UNSUPPORTED.items():
        yield CHAT, {"messages": USER, name: value}, name
    for kwargs in ({"x": 1}, {"enable_thinking": {"a": 1}}, {"enable_thinking": [1] * 99}, "x"):
        yield CHAT, {"messages": USER, "chat_template_kwargs": kwargs}, "chat_template_kwargs"
    for tools, field in TOOLS:
        yield CHAT, {"messages": USER, "tools": tools}, field
    for choice in ("some", {"type": "function", "function": {"name": "g"}}, {"type": "x"}, 5):
        tools = [{"type": "function", "function": {"name": "f"}}]
        yield CHAT, {"messages": USER, "tools": tools, "tool_choice": choice}, "tool_choice"
    for logprobs in (21, -1, True, "1"):
        yield TEXT, {"prompt": "x", "logprobs": logprobs}, "logprobs"
    for top in (21, -1, "1"):
        yield CHAT, {"messages": USER, "logprobs": True, "top_logprobs": top}, "top_logprobs"
    yield CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"
    native: list[tuple[str, Any]] = [
        ("top_logprobs_num", 21),
        ("top_logprobs_num", -1),
        ("logprob_start_len", -2),
        ("logprob_start_len", 99),
        ("token_ids_logprob", [VOCAB_SIZE]),
        ("token_ids_logprob", [-1]),
        ("token_ids_logprob", [True]),
        ("return_logprob", 1),
    ]
    for name, value in native:
        yield NATIVE, {"text": "x", "return_logprob": True, name: value}, name
    for name in ("regex", "json_schema", "ebnf", "stop_regex", "structural_tag", "custom_params"):
        yield NATIVE, {"text": "x", "sampling_params": {name: "("}}, f"sampling_params.{name}"
    yield NATIVE, {"text": "x", "sampling_params": {"wibble": 1}}, "sampling_params"
    yield NATIVE, {"text": "x", "sampling_params": [{}, {}]}, "sampling_params"
    yield NATIVE, {"text": ["x", "y"], "rid": ["a"]}, "rid"
    yield NATIVE, {"text": ["x", "y"], "rid": ["a", "a"]}, "rid"
    yield NATIVE, {"text": "x", "rid": 5}, "rid"
    yield "/tokenize", {}, "prompt"
    yield "/tokenize", {"prompt": 5}, "prompt"
    yield "/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"
    yield "/detokenize", {"tokens": ["x"]}, "tokens"
    yield "/abort_request", {}, "rid"


def vector_cases() -> Iterator[tuple[str, Any, str]]:
    """Prompts, options and labels of routes that generate nothing."""
    for prompt in PROMPTS:
        if prompt == ["x"] * 65:
            continue  # more than one batch: these routes take it
        yield VECTORS, {"input": prompt}, "input"
        ids = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)
        yield "/encode", {"input_ids" if ids else "text": prompt}, "input_ids" if ids else "text"
        yield SCORE, {"items": prompt, "label_token_ids": [1]}, "items"
    yield VECTORS, {"input": ["x"] * 2049}, "input"
    for name, value in {"dimensions": 3, "image_data": "x", "messages": USER}.items():
        yield VECTORS, {"input": "x", name: value}, name
        yield "/encode", {"text": "x", name: value}, name
    for value in ("int8", 5, ["float"]):
        yield VECTORS, {"input": "x", "encoding_format": value}, "encoding_format"
    yield VECTORS, {"input": "x", "normalize": "yes"}, "normalize"
    yield VECTORS, {"input": ["x", "y"], "rid": ["a"]}, "rid"
    for labels in (None, [], [VOCAB_SIZE], [-1], [True], [1.0], "x", list(range(301))):
        body = {"query": "x", "items": "y", "label_token_ids": labels}
        yield SCORE, body, "label_token_ids"
    yield SCORE, {"query": "x", "items": [[1]], "label_token_ids": [1]}, "items"
    yield SCORE, {"query": 5, "items": "x", "label_token_ids": [1]}, "query"


def raw_cases() -> Iterator[tuple[str, Any, str]]:
    """Bodies that no JSON writer would write."""
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "nan"):
        yield TEXT, b'{"prompt": "x", "temperature": %s}' % number.encode(), ""
        yield NATIVE, b'{"text": "x", "sampling_params": {"top_p": %s}}' % number.encode(), ""
    for depth in (33, 100_000):
        yield TEXT, b'{"prompt": "x", "metadata": %s%s}' % (b"[" * depth, b"]" * depth), ""
        yield CHAT, b'{"a":' * depth + b"1" + b"}" * depth, ""
        yield NATIVE, b"[" * depth, ""
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"5",
        b'{"prompt": "x"} x',
        b'{"prompt": "\xff"}',
    ):
        yield TEXT, body, ""
    yield TEXT, b'{"prompt": "\\ud800"}', ""
    yield TEXT, b'{"prompt": null}', "prompt"
    yield TEXT, b'{"model": null, "prompt": "x", "n": 0}', "n"


CASES = list(
    itertools.chain(sampling_cases(), prompt_cases(), other_cases(), vector_cases(), raw_cases())
)

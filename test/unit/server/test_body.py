"""Bodies: depth by counting brackets must agree with depth by parsing."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sps_runtime.server.body import MAX_JSON_DEPTH, check_depth, decode, is_nothing
from sps_runtime.server.openai_types import parse_prompts
from sps_runtime.types.errors import InvalidRequest

NASTY = st.text(alphabet='ab"\\[]{}é\n', max_size=12)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), NASTY),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NASTY, inner, max_size=4)),
    max_leaves=40,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def refused(body: bytes) -> bool:
    try:
        check_depth(body)
    except InvalidRequest:
        return True
    return False


@given(VALUES, st.integers(0, 40), st.integers(0, 40), st.booleans())
@settings(max_examples=400, deadline=None)
@example([], 31, 33, True)
@example('"]\\', 32, 0, True)
def test_depth_is_what_parsing_says(value: Any, wraps: int, beside: int, ascii_only: bool) -> None:
    for level in range(wraps):
        value = [value] if level % 2 else {'k\\"[': value}
    value = {"a": value, "b": [[] for _ in range(beside)], "c": "[{" * beside}
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert refused(body) is (depth(value) > MAX_JSON_DEPTH)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{" * 90 + b"}", b'{"a":' * 5000])
def test_unbalanced_is_refused(body: bytes) -> None:
    assert refused(body)


@pytest.mark.parametrize(
    ("raw", "parsed"),
    [
        (b'"x"', ["x"]),
        (b' "x"', ["x"]),
        (b'["x", "y"]', ["x", "y"]),
        (b"[1, 2]", [[1, 2]]),
        (b"[ [1], [2, 3] ]", [[1], [2, 3]]),
    ],
)
def test_prompts_in_their_four_forms(raw: bytes, parsed: list[Any]) -> None:
    assert parse_prompts(msgspec.Raw(raw), "prompt") == parsed


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"null", "prompt"),
        (b"[]", "prompt"),
        (b"[ ]", "prompt"),
        (b"{}", "prompt"),
        (b'[1, "x"]', "prompt[1]"),
        (b'["x", 1]', "prompt[1]"),
        (b"[[1], [true]]", "prompt[1][0]"),
    ],
)
def test_prompts_in_other_forms(raw: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_prompts(msgspec.Raw(raw), "prompt")
    assert caught.value.field == field


def test_paths_of_errors() -> None:
    class Inner(msgspec.Struct):
        x: int

    with pytest.raises(InvalidRequest) as caught:
        decode(b'{"x": "1"}', Inner, field="sampling_params")
    assert caught.value.field == "sampling_params.x"
    assert "Expected `int`, got `str`" in caught.value.message
    with pytest.raises(InvalidRequest) as key:
        decode(b'{"x": 1}', dict[int, float], field="logit_bias")
    assert key.value.field == "logit_bias"


def test_saying_nothing() -> None:
    for raw in (b"null", b" [] ", b"{}", b'""', b"false"):
        assert is_nothing(msgspec.Raw(raw))
    for raw in (b"0", b"true", b"[0]", b'"x"'):
        assert not is_nothing(msgspec.Raw(raw))

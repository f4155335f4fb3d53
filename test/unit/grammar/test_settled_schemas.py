"""A schema is settled before a backend reads it: the same answers may come from each."""

from __future__ import annotations

import json

import pytest
from test.kit.grammar_walk import accepts

from sps_runtime.grammar.backends import make_backend
from sps_runtime.grammar.protocol import GrammarBackend, Vocabulary

NESTED = '{"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}'
OPEN = '{"type": "object", "properties": {"a": {}}, "additionalProperties": true}'
EITHER = json.dumps(
    {"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object"}, {"type": "null"}]}
)
LISTED = json.dumps(
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "integer"}}}}
)
REFERRED = json.dumps(
    {"$defs": {"point": {"type": "object", "properties": {"x": {}}}}, "$ref": "#/$defs/point"}
)


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def either(request: pytest.FixtureRequest, vocabulary: Vocabulary) -> GrammarBackend:
    pytest.importorskip(request.param, reason="this backend is not installed")
    return make_backend(request.param, vocabulary)


@pytest.mark.parametrize(
    ("schema", "text", "may_come"),
    [
        (NESTED, '{"a": {"b": 1}}', True),
        (NESTED, '{"a": {"c": 1}}', False),
        (NESTED, '{"x": 1}', False),
        (OPEN, '{"a": 1, "x": 1}', True),
        (EITHER, '{"x": 1}', True),
        (EITHER, "null", True),
        (LISTED, '[{"a": 1}]', True),
        (LISTED, '[{"x": 1}]', False),
        (REFERRED, '{"x": 1}', True),
        (REFERRED, '{"y": 1}', False),
        ("true", '{"x": [1]}', True),
    ],
)
def test_objects_have_the_properties_that_they_name(
    either: GrammarBackend, schema: str, text: str, may_come: bool
) -> None:
    assert accepts(either, "json_schema", schema, text) == may_come
    tag = json.dumps(
        {
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": json.loads(schema), "end": "</f>"}],
            "triggers": ["<f>"],
        }
    )
    assert accepts(either, "structural_tag", tag, f"<f>{text}</f>") == may_come

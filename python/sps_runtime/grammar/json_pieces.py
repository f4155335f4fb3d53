"""JSON inside of a Lark grammar: the rule for whitespace, and text that may hold special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from sps_runtime.grammar.protocol import GrammarError

WHITESPACE = r"( |\n[ \t]{0,12})"
"""Between JSON's tokens: one space, or a new line with its indentation. Bounded, so that a model
cannot fill an answer with blanks."""


_COMBINED = ("$ref", "anyOf", "oneOf", "if", "not", "dependentSchemas")
_OTHERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def schema_object(source: str) -> dict[str, Any]:
    """Read a schema, a JSON object or true.

    Raises:
        GrammarError: it is neither.
    """
    try:
        schema = msgspec.json.decode(source)
    except (msgspec.DecodeError, RecursionError):
        raise GrammarError("the schema is not valid JSON") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError("a schema is a JSON object")
    return schema


def settled_schema(schema: Any) -> Any:
    """The schema as answers are held to it, whatever backend serves it: with objects that tell
    their properties closed to others (`closed`)."""
    return schema if '"allOf"' in json.dumps(schema) else closed(schema)


def guided_schema(schema: Any) -> Any:
    """`settled_schema` for llguidance: with our rule for whitespace, whatever its own hints say."""
    settled = settled_schema(schema)
    if not isinstance(settled, dict):
        return settled  # true: anything
    return {**settled, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def closed(schema: Any) -> Any:
    """Forbid properties that an object does not name, unless it says what becomes of them.

    JSON Schema allows them, but who names properties wants those; the strict modes of OpenAI and
    SGLang do the same. What this leaves is still valid under the schema. Not for schemas with
    allOf, whose parts name properties for one another.
    """
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _NAMED:
        if isinstance(found.get(key), dict):
            found[key] = {name: closed(value) for name, value in found[key].items()}
    for key in _LISTED:
        if isinstance(found.get(key), list):
            found[key] = [closed(value) for value in found[key]]
    for key in _SINGLE:
        if key in found:
            found[key] = closed(found[key])
    if "properties" in found and not any(key in found for key in (*_OTHERS, *_COMBINED)):
        found["additionalProperties"] = False
    return found


def json_rule(schema: Any) -> str:
    """Lark for a value of a schema."""
    return f"%json {json.dumps(guided_schema(schema))}"


def literal(text: str, special: Mapping[str, int]) -> str:
    """Lark for exactly `text`, "" for none.

    Args:
        special: ids of special tokens, which are no text to a matcher, by their content; they are
            named as ``<[7]>``.
    """
    if not special:
        return json.dumps(text) if text else ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text)
    items = (f"<[{special[p]}]>" if p in special else json.dumps(p) for p in pieces if p)
    return " ".join(items)

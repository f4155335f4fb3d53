"""JSON inside of a Lark grammar: the rule for whitespace, and text that may hold special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

WHITESPACE = r"( |\n[ \t]{0,12})"
"""Between JSON's tokens: one space, or a new line with its indentation. Bounded, so that a model
cannot fill an answer with blanks."""


def with_whitespace(schema: Any) -> Any:
    """The schema with our rule for whitespace, whatever its own hints say."""
    if not isinstance(schema, dict):
        return schema  # true: anything
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def json_rule(schema: Any) -> str:
    """Lark for a value of a schema."""
    return f"%json {json.dumps(with_whitespace(schema))}"


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

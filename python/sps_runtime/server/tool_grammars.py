"""Grammars of tool calls in a model's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sps_runtime.frontend.parsing.tool_formats import ToolFormat
from sps_runtime.grammar.json_pieces import json_rule, literal
from sps_runtime.types.grammar import GrammarSpec

Signatures = Mapping[str, Any]
"""Schemas of functions' arguments, by name."""


def calls_grammar(
    form: ToolFormat, signatures: Signatures, special: Mapping[str, int], *, parallel: bool
) -> GrammarSpec:
    """An answer that is one call, or (`parallel`) one or more, and nothing else.

    Args:
        special: ids of special tokens, by what they read.
    """
    begin = literal(("" if form.bare else form.markers[0]) + form.before, special)
    between, end = literal(form.between, special), literal(form.after, special)
    unit = "call"
    if form.marker_per_call:
        unit, begin, end, call = "marked", "", "", f"marked: {begin} call {end}\n"
    else:
        call = ""
    more = f" ({between} {unit})*" if parallel else ""
    schema = {"anyOf": [_call(form, name, arguments) for name, arguments in signatures.items()]}
    rules = f"%llguidance {{}}\nstart: {begin} {unit}{more} {end}\n{call}"
    return GrammarSpec("lark", f"{rules}call: {json_rule(_plain(schema))}\n")


def strict_grammar(form: ToolFormat, signatures: Signatures) -> GrammarSpec:
    """Free text, in which calls of these functions keep to their schemas."""
    marker = form.markers[0]
    structures = [
        {
            "begin": f"{marker}{form.before}"
            f'{{"name": {json.dumps(name)}, {json.dumps(form.arguments)}: ',
            "schema": arguments,
            "end": "}" + form.after,
        }
        for name, arguments in signatures.items()
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": [marker]}
    return GrammarSpec("structural_tag", json.dumps(tag))


def _call(form: ToolFormat, name: str, arguments: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, form.arguments: arguments},
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }


def _plain(schema: dict[str, Any]) -> Any:
    """A choice of one is none. Definitions move up, where references look for them."""
    found: dict[str, Any] = {}
    for call in schema["anyOf"]:
        for value in call["properties"].values():
            for key in ("$defs", "definitions"):
                if isinstance(value, dict) and isinstance(value.get(key), dict):
                    found.setdefault(key, {}).update(value[key])
    only = schema["anyOf"][0] if len(schema["anyOf"]) == 1 else schema
    return {**only, **found}

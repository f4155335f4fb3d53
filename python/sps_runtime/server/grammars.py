"""From the many ways in which clients write a grammar to the one that they mean."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from sps_runtime.frontend.query import Query
from sps_runtime.server.body import is_nothing, nothing
from sps_runtime.server.sampling_fields import SamplingFields
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.grammar import ANY_JSON_OBJECT, GrammarKind, GrammarSpec


@dataclass(frozen=True)
class Grammar:
    """A request's grammar.

    Attributes:
        field: how the client calls it.
    """

    field: str
    spec: GrammarSpec


class JsonSchemaFormat(msgspec.Struct):
    """``response_format.json_schema``."""

    schema: msgspec.Raw = msgspec.field(default_factory=nothing)
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """``response_format``: a structural tag brings its fields beside its type."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: msgspec.Raw = msgspec.field(default_factory=nothing)
    triggers: msgspec.Raw = msgspec.field(default_factory=nothing)


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's ``structured_outputs``."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class GrammarFields(SamplingFields, kw_only=True):
    """What an OpenAI route takes besides: its own, SGLang's, and vLLM's names of grammars."""

    response_format: ResponseFormat | None = None
    regex: str | None = None
    json_schema: Any = None
    ebnf: str | None = None
    structural_tag: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def grammar(self) -> Grammar | None:
        """Return the grammar. Raises InvalidRequest for several at once."""
        found = [
            given("regex", "regex", self.regex),
            given("json_schema", "json_schema", self.json_schema),
            given("ebnf", "ebnf", self.ebnf),
            given("structural_tag", "structural_tag", self.structural_tag),
            given("guided_json", "json_schema", self.guided_json),
            given("guided_regex", "regex", self.guided_regex),
            given("guided_choice", "lark", _choice(self.guided_choice)),
            given("guided_grammar", "ebnf", self.guided_grammar),
            *_outputs(self.structured_outputs),
            _format(self.response_format),
        ]
        return only(found)


def given(field: str, kind: GrammarKind, value: Any) -> Grammar | None:
    """A grammar where the value says something. Structured values become JSON text."""
    if value in (None, "", {}, []):
        return None
    if not isinstance(value, str):
        if kind not in ("json_schema", "structural_tag") or not isinstance(value, dict | bool):
            raise InvalidRequest(f"{field} must be a string", field=field)
        value = json.dumps(value)
    return Grammar(field, GrammarSpec(kind, value))


def constrained(query: Query, grammar: Grammar | None) -> Query:
    """The query under a grammar, if there is one."""
    if grammar is None:
        return query
    return replace(query, grammar=grammar.spec, names={**query.names, "grammar": grammar.field})


def only(found: Iterable[Grammar | None]) -> Grammar | None:
    """The one grammar among some fields. Raises InvalidRequest when there are several."""
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        names = " and ".join(grammar.field for grammar in grammars)
        raise InvalidRequest(f"at most one grammar is possible, not {names}", field=names)
    return grammars[0] if grammars else None


def _choice(choices: list[str] | None) -> str:
    return "start: " + " | ".join(map(json.dumps, choices)) if choices else ""


def _outputs(outputs: StructuredOutputs | None) -> list[Grammar | None]:
    if outputs is None:
        return []
    where = "structured_outputs"
    return [
        given(f"{where}.json", "json_schema", outputs.json),
        given(f"{where}.regex", "regex", outputs.regex),
        given(f"{where}.choice", "lark", _choice(outputs.choice)),
        given(f"{where}.grammar", "ebnf", outputs.grammar),
        given(f"{where}.json_object", "json_schema", ANY_JSON_OBJECT * bool(outputs.json_object)),
        given(f"{where}.structural_tag", "structural_tag", outputs.structural_tag),
    ]


def _format(response_format: ResponseFormat | None) -> Grammar | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Grammar("response_format", GrammarSpec("json_schema", ANY_JSON_OBJECT))
    if response_format.type == "structural_tag":
        tag = {
            "type": "structural_tag",
            "structures": response_format.structures,
            "triggers": response_format.triggers,
        }
        source = msgspec.json.encode(tag).decode()
        return Grammar("response_format", GrammarSpec("structural_tag", source))
    field = "response_format.json_schema"
    if response_format.json_schema is None or is_nothing(response_format.json_schema.schema):
        raise InvalidRequest(f"{field} is missing", field=field)
    schema = bytes(response_format.json_schema.schema).decode()
    return Grammar(f"{field}.schema", GrammarSpec("json_schema", schema))

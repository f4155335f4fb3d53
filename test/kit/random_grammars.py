"""Random grammars with judges of their own: JSON Schema by `jsonschema`, regexes by `re`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from sps_runtime.types.grammar import GrammarKind, GrammarSpec

WORDS = ("red", "green", "blue", "naïve", "two words", "", 'quo"te', "back\\slash", "日本")

NAMES = ("id", "name", "grüße", "a b", "list", 'q"', "n1")


@dataclass(frozen=True)
class Case:
    """A grammar, and whether a text is one of its answers."""

    spec: GrammarSpec
    holds: Callable[[str], bool]

    @property
    def kind(self) -> GrammarKind:
        return self.spec.kind


def random_case(chance: random.Random) -> Case:
    """Half of them schemas, half regexes; every answer is short."""
    if chance.random() < 0.5:
        schema = json.dumps(_schema(chance, 3))
        validator = jsonschema.Draft202012Validator(json.loads(schema))
        return Case(GrammarSpec("json_schema", schema), lambda text: _valid(validator, text))
    pattern = _regex(chance, 3)
    compiled = re.compile(pattern)
    return Case(GrammarSpec("regex", pattern), lambda text: compiled.fullmatch(text) is not None)


def _valid(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def _schema(chance: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _integer, _enum, _const, _flag)
    branches = (_object, _object, _array, _any_of)
    return chance.choice(branches if depth and chance.random() < 0.6 else leaves)(chance, depth)


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"type": "string", "pattern": "^[a-f0-9]{2,6}$"}
    low = chance.randrange(3)
    return {"type": "string", "minLength": low, "maxLength": low + chance.randrange(1, 9)}


def _integer(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randrange(-500, 500)
    return {"type": "integer", "minimum": low, "maximum": low + chance.randrange(1, 2000)}


def _enum(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": [*chance.sample(WORDS, 3), 7, None, True]}


def _const(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"const": chance.choice([*WORDS, 12.5, {"a": [1, "b"]}])}


def _flag(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"type": chance.choice(["boolean", "null"])}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(
        ["id", "name", "grüße", "a b", "list", 'q"', "n1"], chance.randrange(1, 4)
    )
    required = [name for name in names if chance.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _schema(chance, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randrange(2)
    items = _schema(chance, depth - 1)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}


def _any_of(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(chance, depth - 1) for _ in range(2)]}


def _regex(chance: random.Random, depth: int) -> str:
    if not depth or chance.random() < 0.25:
        return chance.choice(["[a-z]", "[0-9]", "x", "äß", "[^a-y\\n]", r"\.", "[A-Z_]", " ", "ok"])
    kind = chance.randrange(4)
    parts = [_regex(chance, depth - 1) for _ in range(chance.randrange(2, 4))]
    if kind == 0:
        return "(" + "|".join(parts) + ")"
    if kind == 1:
        low = chance.randrange(3)
        return f"({parts[0]}){{{low},{low + chance.randrange(1, 4)}}}"
    if kind == 2:
        return f"({parts[0]})?" + parts[1]
    return "".join(parts)

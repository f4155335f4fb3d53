"""SGLang's structural tags: free text in which marked pieces follow a schema.

``{"type": "structural_tag", "structures": [{"begin", "schema", "end"}], "triggers": [...]}``: the
text is free until a trigger appears; what begins with it must then be one of the structures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sps_runtime.grammar.json_pieces import json_rule, literal
from sps_runtime.grammar.protocol import GrammarError

ANY_TEXT = r"/(.|\n)*/"


class _Structure(msgspec.Struct):
    begin: str
    end: str = ""
    schema: Any = True


class _StructuralTag(msgspec.Struct, tag="structural_tag", tag_field="type"):
    structures: list[_Structure]
    triggers: list[str]


def structural_tag_to_lark(source: str, special: Mapping[str, int]) -> str:
    """Return the Lark grammar of a structural tag.

    Args:
        source: JSON.
        special: ids of special tokens, which are no text to a matcher, by their content.

    Raises:
        GrammarError: when it is not of the form above.
    """
    tag = _read(source)
    rules = [
        _rule(index, structure, _trigger(structure, tag.triggers), special)
        for index, structure in enumerate(tag.structures)
    ]
    names = " | ".join(f"tag_{index}" for index in range(len(rules)))
    head = f"%llguidance {{}}\nstart: ({names})* rest\nrest: TAG_TEXT\nTAG_TEXT: {ANY_TEXT}\n"
    return head + "\n".join(rules)


def structures_of(source: str) -> tuple[list[tuple[str, Any, str]], list[str]]:
    """A structural tag's structures, (begin, schema, end) each, and its triggers.

    Raises:
        GrammarError: when it is not of the form above.
    """
    tag = _read(source)
    for structure in tag.structures:
        _trigger(structure, tag.triggers)
    return [(one.begin, one.schema, one.end) for one in tag.structures], tag.triggers


def _read(source: str) -> _StructuralTag:
    try:
        tag = msgspec.json.decode(source, type=_StructuralTag)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise GrammarError(f"the structural tag cannot be read: {error}") from None
    if not tag.structures:
        raise GrammarError("the structural tag has no structures")
    return tag


def _trigger(structure: _Structure, triggers: Sequence[str]) -> str:
    found = [trigger for trigger in triggers if trigger and structure.begin.startswith(trigger)]
    if not found:
        raise GrammarError(f"no trigger begins the structure {structure.begin[:40]!r}")
    return max(found, key=len)


def _rule(
    index: int,
    structure: _Structure,
    trigger: str,
    special: Mapping[str, int],
) -> str:
    name = f"tag_{index}"
    rest = literal(structure.begin[len(trigger) :], special)
    body = f"{rest} {json_rule(structure.schema)} {literal(structure.end, special)}".rstrip()
    if any(token in trigger for token in special):
        return f"{name}: TAG_TEXT {literal(trigger, special)} {body}\n"
    return f"{name}_head[lazy]: TAG_TEXT {literal(trigger, special)}\n{name}: {name}_head {body}\n"

"""SGLang's structural tags: free text in which marked pieces follow a schema.

``{"type": "structural_tag", "structures": [{"begin", "schema", "end"}], "triggers": [...]}``: the
text is free until a trigger appears; what begins with it must then be one of the structures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sps_runtime.grammar.protocol import GrammarError

ANY_TEXT = r"/(.|\n)*/"
WithWhitespace = Callable[[Any], Any]


class _Structure(msgspec.Struct):
    begin: str
    end: str = ""
    schema: Any = True


class _StructuralTag(msgspec.Struct, tag="structural_tag", tag_field="type"):
    structures: list[_Structure]
    triggers: list[str]


def structural_tag_to_lark(
    source: str, special: Mapping[str, int], with_whitespace: WithWhitespace
) -> str:
    """Return the Lark grammar of a structural tag.

    Args:
        source: JSON.
        special: ids of special tokens, which are no text to a matcher, by their content.
        with_whitespace: adds the backend's rule for whitespace to a schema.

    Raises:
        GrammarError: when it is not of the form above.
    """
    try:
        tag = msgspec.json.decode(source, type=_StructuralTag)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise GrammarError(f"the structural tag cannot be read: {error}") from None
    if not tag.structures:
        raise GrammarError("the structural tag has no structures")
    rules = [
        _rule(index, structure, _trigger(structure, tag.triggers), special, with_whitespace)
        for index, structure in enumerate(tag.structures)
    ]
    names = " | ".join(f"tag_{index}" for index in range(len(rules)))
    head = f"%llguidance {{}}\nstart: ({names})* rest\nrest: TAG_TEXT\nTAG_TEXT: {ANY_TEXT}\n"
    return head + "\n".join(rules)


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
    with_whitespace: WithWhitespace,
) -> str:
    name = f"tag_{index}"
    schema = json.dumps(with_whitespace(structure.schema))
    rest = literal(structure.begin[len(trigger) :], special)
    body = f"{rest} %json {schema} {literal(structure.end, special)}".rstrip()
    if any(token in trigger for token in special):
        return f"{name}: TAG_TEXT {literal(trigger, special)} {body}\n"
    return f"{name}_head[lazy]: TAG_TEXT {literal(trigger, special)}\n{name}: {name}_head {body}\n"


def literal(text: str, special: Mapping[str, int]) -> str:
    """Lark for exactly `text`; special tokens in it are named by id, as ``<[7]>``."""
    if not special:
        return json.dumps(text) if text else ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text)
    items = (f"<[{special[p]}]>" if p in special else json.dumps(p) for p in pieces if p)
    return " ".join(items)

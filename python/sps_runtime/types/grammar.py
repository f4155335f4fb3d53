"""A grammar that an answer must follow, as a client gives it."""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["regex", "json_schema", "ebnf", "structural_tag", "lark"]

ANY_JSON_OBJECT = '{"type": "object"}'
"""The schema of ``response_format: {"type": "json_object"}``."""


class GrammarSpec(msgspec.Struct, frozen=True):
    """One grammar, before anything has looked at it.

    Attributes:
        kind: ``regex`` matches the whole answer; ``json_schema`` is a schema as JSON text; ``ebnf``
            is GBNF (``root ::= ...``) or Lark; ``structural_tag`` is SGLang's JSON; ``lark`` is
            what this server writes itself, for tools.
        source: its text.
    """

    kind: GrammarKind
    source: str

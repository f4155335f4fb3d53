"""Grammars of answers that reason first: the reasoning is free, what follows it is not."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sps_runtime.frontend.parsing.reasoning import BEGIN, END, ReasoningFormat
from sps_runtime.grammar.json_pieces import json_rule, literal
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.grammar import GrammarSpec


def after_reasoning(
    spec: GrammarSpec, form: ReasoningFormat, special: Mapping[str, int], field: str
) -> GrammarSpec:
    """Return a grammar that lets reasoning come first.

    Structural tags begin with free text anyway. EBNF cannot be put behind other rules without
    reading it: it holds from the first token on.

    Args:
        special: ids of special tokens, by what they read.
        field: how the client calls the grammar.

    Raises:
        InvalidRequest: a schema that is no JSON.
    """
    if spec.kind in ("structural_tag", "ebnf"):
        return spec
    start = "start: thought BLANK? answer"
    if not form.opened:
        start = f"start: ({literal(BEGIN, special)} thought BLANK?)? answer"
    head = (
        f"%llguidance {{}}\n{start}\n"
        f"thought[lazy]: THOUGHT {literal(END, special)}\n"
        "THOUGHT: /(.|\\n)*/\nBLANK: /\\n{1,2}/\n"
    )
    return GrammarSpec("lark", head + _answer(spec, field))


def _answer(spec: GrammarSpec, field: str) -> str:
    """The grammar as a rule called ``answer``."""
    if spec.kind == "lark":  # our own, which begins with its start
        return spec.source.removeprefix("%llguidance {}\n").replace("start:", "answer:", 1)
    if spec.kind == "regex":
        return f"answer: /{_escaped(spec.source)}/\n"
    try:
        schema = msgspec.json.decode(spec.source)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"{field} cannot be used: the schema is not valid JSON",
            field=field,
            code="invalid_grammar",
        ) from None
    return f"answer: {json_rule(schema)}\n"


def _escaped(regex: str) -> str:
    """A regex between slashes: slashes of its own are escaped, unless they are already."""
    escaped, after_backslash = [], False
    for char in regex:
        if char == "/" and not after_backslash:
            escaped.append("\\")
        escaped.append(char)
        after_backslash = char == "\\" and not after_backslash
    return "".join(escaped).replace("\n", "\\n")

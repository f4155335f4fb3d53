"""A conversation that is to be answered, whichever API it came by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from sps_runtime.frontend.parsing.answer_parser import AnswerParser
from sps_runtime.frontend.parsing.reasoning import ReasoningParser
from sps_runtime.frontend.query import Query
from sps_runtime.server.grammars import Grammar, constrained, only
from sps_runtime.server.reasoning_grammar import after_reasoning
from sps_runtime.server.service import Service
from sps_runtime.server.tools import Toolbox


@dataclass(frozen=True)
class ChatJob:
    """Attributes:
    query: what is asked.
    new_parser: makes the parser of one answer.
    """

    query: Query
    new_parser: Callable[[], AnswerParser]


def chat_job(
    service: Service,
    query: Query,
    toolbox: Toolbox,
    grammar: Grammar | None,
    *,
    separate_reasoning: bool = True,
) -> ChatJob:
    """Put grammars, tools and parsers together.

    Args:
        query: without grammar.
        grammar: that the client asked for itself.

    Raises:
        InvalidRequest: a grammar beside tools that need one.
    """
    form = service.reasoning_format
    found = only((grammar, _needed(toolbox, grammar)))
    if found is not None and form is not None:
        special = service.manager.tokenizer.special_texts
        found = replace(found, spec=after_reasoning(found.spec, form, special, found.field))
    query = constrained(query, found)
    if toolbox.active and toolbox.form is not None and toolbox.form.special_tokens:
        options = msgspec.structs.replace(query.options, skip_special_tokens=False)
        query = replace(query, options=options)

    def new_parser() -> AnswerParser:
        reasoning = ReasoningParser(form) if form is not None and separate_reasoning else None
        return AnswerParser(reasoning, toolbox.parser())

    return ChatJob(query, new_parser)


def _needed(toolbox: Toolbox, grammar: Grammar | None) -> Grammar | None:
    """Under a grammar of the client's own, strict tools have nothing to keep to."""
    return None if grammar is not None and toolbox.choice == "auto" else toolbox.grammar()

"""Chat templates in a sandbox, with the helpers that Hugging Face templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sps_runtime.types.errors import ConfigError, InvalidRequest


class _Refused(Exception):
    """The template itself refused the conversation (``raise_exception``)."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON without the HTML escapes of jinja2's own filter, as transformers renders it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template.

    Args:
        source: the template; kept as an attribute.
        bos_token, eos_token: given to it as variables.

    Raises:
        ConfigError: when it does not compile.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}") from None
        self._fixed = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        max_chars: int,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return the prompt of a conversation.

        Args:
            messages: each with ``role`` and ``content``.
            variables: further template variables; ``add_generation_prompt`` is true unless told.
            max_chars: output beyond this is refused while it is being made.
            tools: for the template to describe, if it knows how.

        Raises:
            InvalidRequest: when the template refuses the conversation, fails on it, or the output
                is too long.
        """
        told = {"tools": list(tools) or None, **(variables or {})}
        values = {"add_generation_prompt": True, **told, **self._fixed}
        try:
            return self._bounded(messages, values, max_chars)
        except _Refused as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidRequest(
                f"the chat template refuses these messages: {reason}", field="messages"
            ) from None
        except InvalidRequest:
            raise
        except Exception as error:  # a template can fail in any way; only this request may
            raise InvalidRequest(
                f"the chat template fails on these messages ({type(error).__name__})",
                field="messages",
            ) from None

    def _bounded(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], max_chars: int
    ) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(messages=list(messages), **values):
            pieces.append(piece)
            length += len(piece)
            if length > max_chars:
                raise InvalidRequest(
                    f"the conversation is longer than {max_chars} characters",
                    field="messages",
                    code="context_length_exceeded",
                )
        return "".join(pieces)

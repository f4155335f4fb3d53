"""Answers of /v1/messages, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from sps_runtime.frontend.parsing.answer_parser import AnswerParser
from sps_runtime.frontend.parsing.events import CallArguments, CallBegin, Event, Reasoning, Text
from sps_runtime.frontend.request_state import Finish, Output, RequestState
from sps_runtime.server.answers import Answer
from sps_runtime.server.chat_writer import ParsedAnswer
from sps_runtime.server.error_handlers import describe
from sps_runtime.server.event_stream import Framing, named_event
from sps_runtime.server.openai_common import attention_report

_ERROR_TYPES = {"service_unavailable": "overloaded_error", "internal_server_error": "api_error"}


class AnthropicErrorFields(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, kw_only=True):
    """The body of an error of Anthropic's routes."""

    type: Literal["error"] = "error"
    error: AnthropicErrorFields


class MessageWriter:
    """Writes one request's answer.

    Args:
        model: as the client named it.
        cache_report: tell apart which prompt tokens came from the cache.
    """

    def __init__(
        self, model: str, state: RequestState, parser: AnswerParser, *, cache_report: bool
    ) -> None:
        self._model = model
        self._state = state
        self._parser = parser
        self._cache_report = cache_report
        self._open: str | None = None
        self._index = -1

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        parsed = ParsedAnswer.of(answer.text, self._parser)
        content: list[dict[str, Any]] = []
        if parsed.reasoning:
            content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": ""})
        if parsed.text:
            content.append({"type": "text", "text": parsed.text})
        content += [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["name"],
                "input": _object(call["arguments"]),
            }
            for call in parsed.calls
        ]
        ending = self._ending(answer.finish) | attention_report(answer.finish, self._state)
        return self._message(content) | ending | {"usage": self._usage()}

    def opening(self) -> list[Any]:
        """The first event."""
        message = self._message([]) | self._ending(None) | {"usage": self._usage()}
        return [{"type": "message_start", "message": message}]

    def events(self, output: Output) -> Iterable[Any]:
        """The events of one output."""
        parsed = self._parser.push(output.text) if output.text else []
        if output.finish is not None:
            parsed += self._parser.finish()
        for event in parsed:
            yield from self._block(event)
        if output.finish is not None:
            yield from self._close()
            delta = self._ending(output.finish)
            report = attention_report(output.finish, self._state)
            yield {"type": "message_delta", "delta": delta, "usage": self._usage(), **report}
            yield {"type": "message_stop"}

    def _block(self, event: Event) -> Iterable[Any]:
        """A delta, in a block of its kind."""
        start: dict[str, Any]
        match event:
            case Text(text):
                kind, start = "text", {"type": "text", "text": ""}
                delta = {"type": "text_delta", "text": text}
            case Reasoning(text):
                kind, start = "thinking", {"type": "thinking", "thinking": "", "signature": ""}
                delta = {"type": "thinking_delta", "thinking": text}
            case CallBegin(index, call_id, name):
                kind = f"call {index}"
                start = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": ""}
            case CallArguments(index, text):
                kind, start = f"call {index}", {}
                delta = {"type": "input_json_delta", "partial_json": text}
        if kind != self._open:
            yield from self._close()
            self._open, self._index = kind, self._index + 1
            yield {"type": "content_block_start", "index": self._index, "content_block": start}
        yield {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterable[Any]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._state.label}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }

    def _ending(self, finish: Finish | None) -> dict[str, Any]:
        sequence = finish.matched if finish is not None else None
        stop = sequence if isinstance(sequence, str) else None
        return {"stop_reason": self._stop_reason(finish, stop), "stop_sequence": stop}

    def _stop_reason(self, finish: Finish | None, sequence: str | None) -> str | None:
        if finish is None:
            return None
        if finish.kind == "length":
            return "max_tokens"
        if self._parser.calls:
            return "tool_use"
        return "end_turn" if sequence is None else "stop_sequence"

    def _usage(self) -> dict[str, Any]:
        state = self._state
        cached = state.cached_tokens if self._cache_report else 0
        return {
            "input_tokens": state.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": state.completion_tokens,
        }


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def anthropic_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for any exception, in Anthropic's form."""
    status, body = describe(error)
    kind = _ERROR_TYPES.get(body["type"], body["type"])
    fields = AnthropicErrorFields(kind, body["message"])
    return status, msgspec.to_builtins(AnthropicError(error=fields))


NAMED = Framing(named_event, lambda error: named_event(anthropic_error(error)[1]))
"""Every event has the name that its type is; nothing follows the last one."""

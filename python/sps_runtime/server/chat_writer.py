"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sps_runtime.frontend.parsing.answer_parser import AnswerParser
from sps_runtime.frontend.parsing.events import CallArguments, CallBegin, Event, Reasoning, Text
from sps_runtime.frontend.request_state import Output, RequestState
from sps_runtime.server.answers import Answer
from sps_runtime.server.openai_common import attention_report, finish_reason, matched_stop, usage
from sps_runtime.server.openai_logprobs import chat_logprobs
from sps_runtime.server.openai_types import ChatBody
from sps_runtime.server.service import Call
from sps_runtime.types.plan import TokenLogprobs


@dataclass
class ParsedAnswer:
    """An answer's parts, gathered.

    Attributes:
        calls: each with ``id``, ``name`` and ``arguments``.
    """

    reasoning: str = ""
    text: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, parser: AnswerParser) -> ParsedAnswer:
        """Parse a whole answer."""
        answer = cls()
        for event in [*parser.push(text), *parser.finish()]:
            match event:
                case Reasoning(more):
                    answer.reasoning += more
                case Text(more):
                    answer.text += more
                case CallBegin(_, call_id, name):
                    answer.calls.append({"id": call_id, "name": name, "arguments": ""})
                case CallArguments(index, more):
                    answer.calls[index]["arguments"] += more
        return answer


class ChatWriter:
    """Writes one request's answers.

    Args:
        new_parser: makes the parser of one answer.
    """

    def __init__(self, call: Call, body: ChatBody, new_parser: Callable[[], AnswerParser]) -> None:
        self._tokenizer = call.service.manager.tokenizer
        self._cache_report = call.service.server.enable_cache_report
        self._body = body
        self._model = body.model or call.service.model_name
        self._created = int(time.time())
        self._states: Sequence[RequestState] = ()
        self._new_parser = new_parser
        self._parsers: list[AnswerParser] = []

    def begin(self, states: Sequence[RequestState]) -> None:
        self._states = states
        self._parsers = [self._new_parser() for _ in states]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for answer in answers:
            parsed = ParsedAnswer.of(answer.text, self._parsers[answer.state.index])
            choices.append(
                {
                    "index": answer.state.index,
                    "message": _message(parsed),
                    "logprobs": self._logprobs(answer.logprobs),
                    "finish_reason": _ending(finish_reason(answer.finish), bool(parsed.calls)),
                    "matched_stop": matched_stop(answer.finish),
                    **attention_report(answer.finish, answer.state),
                }
            )
        return self._envelope("chat.completion", choices) | {"usage": self._usage()}

    def opening(self) -> list[Any]:
        """The chunks that name the role, at admission."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(state.index, delta) for state in self._states]

    def events(self, output: Output) -> Iterable[Any]:
        """The chunks of one output: what is new, then the end."""
        index, finish = output.state.index, output.finish
        parser, logprobs = self._parsers[index], output.logprobs
        parsed = parser.push(output.text) if output.text else []
        if finish is not None:
            parsed += parser.finish()
        for event in parsed:
            yield self._chunk(index, _delta(event), logprobs)
            logprobs = []
        if logprobs:
            yield self._chunk(index, {"content": ""}, logprobs)
        if finish is not None:
            ends = {
                "finish_reason": _ending(finish_reason(finish), parser.calls > 0),
                "matched_stop": matched_stop(finish),
                **attention_report(finish, output.state),
            }
            yield self._chunk(index, {}, ends=ends)

    def closing(self) -> Iterable[Any]:
        if self._body.wants_usage_chunk:
            yield self._envelope("chat.completion.chunk", []) | {"usage": self._usage()}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Sequence[TokenLogprobs] = (),
        ends: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": None,
            **(ends or {}),
        }
        return self._envelope("chat.completion.chunk", [choice])

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._tokenizer) if self._body.logprobs else None

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._states[0].label}",
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        choices = self._body.n or 1
        return usage(self._states, choices, cache_report=self._cache_report)


def _message(parsed: ParsedAnswer) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": parsed.text or (None if parsed.calls else ""),
        "reasoning_content": parsed.reasoning or None,
    }
    if parsed.calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in parsed.calls
        ]
    return message


def _delta(event: Event) -> dict[str, Any]:
    match event:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case CallBegin(index, call_id, name):
            begin = {"index": index, "id": call_id, "type": "function"}
            return {"tool_calls": [{**begin, "function": {"name": name, "arguments": ""}}]}


def _ending(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else reason

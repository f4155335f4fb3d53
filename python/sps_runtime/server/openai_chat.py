"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.query import ChatPrompt, LogprobOptions, Query
from sps_runtime.frontend.request_state import Output, RequestState
from sps_runtime.server.answers import Answer, complete
from sps_runtime.server.body import decode, decode_fields, read_body
from sps_runtime.server.error_handlers import request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.grammars import constrained
from sps_runtime.server.openai_common import (
    attention_report,
    finish_reason,
    labels_of,
    matched_stop,
    usage,
)
from sps_runtime.server.openai_logprobs import chat_logprobs
from sps_runtime.server.openai_types import ChatBody, Message
from sps_runtime.server.options import OPENAI, check_options
from sps_runtime.server.service import Call
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.plan import TokenLogprobs

TEMPLATE_VARIABLES = ("enable_thinking", "add_generation_prompt")
"""Template variables that a request may set, to scalars."""


async def chat_completions(call: Call) -> ASGIApp:
    """Answer one conversation, whole or streamed."""
    service = call.service
    raw = await read_body(
        call.request, service.manager.limits.max_body_bytes, service.timeouts.body
    )
    headers = check_options(decode_fields(raw), ChatBody, OPENAI)
    body: ChatBody = decode(raw, ChatBody)
    service.check_model(body.model)
    query = constrained(_query(call, body), body.grammar())
    writer = _Writer(call, body)
    if body.stream:
        group = await service.manager.submit([query])
        writer.begin(group.states)
        return EventStream(
            call,
            group,
            writer.events,
            opening=writer.opening(),
            closing=writer.closing,
            headers=headers,
        )
    answers = await complete(call, [query])
    writer.begin([answer.state for answer in answers])
    content = msgspec.json.encode(writer.whole(answers))
    return Response(
        content, 200, {**headers, **request_id_header(call.request)}, "application/json"
    )


def _query(call: Call, body: ChatBody) -> Query:
    told_as = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, told_as)
    return Query(
        prompt=chat_prompt(body.messages, template_variables(body)),
        options=body.sampling(limit),
        logprobs=_logprob_options(body),
        attention=body.attention,
        default_max_new_tokens=None,
        use_model_defaults=True,
        tenant=call.identity.tenant,
        owner=call.identity.owner,
        label=labels_of(body.rid, 1)[0],
        names={
            "prompt": "messages",
            "max_new_tokens": told_as,
            "min_new_tokens": "min_tokens",
            "sampling_seed": "seed",
        },
    )


def _logprob_options(body: ChatBody) -> LogprobOptions | None:
    if body.logprobs:
        return LogprobOptions(body.top_logprobs or 0)
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return None


def chat_prompt(messages: Sequence[Message], variables: Mapping[str, Any]) -> ChatPrompt:
    """Return the conversation as a template takes it: every content is one text.

    Raises:
        InvalidRequest: for no messages, or parts of another kind than text.
    """
    if not messages:
        raise InvalidRequest("messages is empty", field="messages")
    return ChatPrompt([_plain(message, i) for i, message in enumerate(messages)], variables)


def _plain(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(
                f"{where}.{name} is not supported by this server",
                field=f"{where}.{name}",
                code="unsupported_option",
            )
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text_of(message, f"{where}.content")}


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise InvalidRequest(f"{where} is missing", field=where)
    for i, part in enumerate(message.content):
        if part.type not in ("text", "input_text") or part.text is None:
            field = f"{where}[{i}].type"
            raise InvalidRequest(
                f"{field}: this server takes text only", field=field, code="unsupported_content"
            )
    return "\n".join(part.text for part in message.content if part.text is not None)


def template_variables(body: ChatBody) -> dict[str, Any]:
    """Return the template variables that a request sets.

    Raises:
        InvalidRequest: for names that are not in `TEMPLATE_VARIABLES` and values that are no
            scalars.
    """
    variables = dict(body.chat_template_kwargs or {})
    for name, value in variables.items():
        if name not in TEMPLATE_VARIABLES or not isinstance(value, bool | int | float | str):
            field = "chat_template_kwargs"
            raise InvalidRequest(
                f"{field} may set {' and '.join(TEMPLATE_VARIABLES)}, to scalars", field=field
            )
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    return variables


class _Writer:
    """Writes one request's answers."""

    def __init__(self, call: Call, body: ChatBody) -> None:
        self._tokenizer = call.service.manager.tokenizer
        self._cache_report = call.service.server.enable_cache_report
        self._body = body
        self._model = body.model or call.service.model_name
        self._created = int(time.time())
        self._states: Sequence[RequestState] = ()

    def begin(self, states: Sequence[RequestState]) -> None:
        self._states = states

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for answer in answers:
            message = {"role": "assistant", "content": answer.text, "reasoning_content": None}
            choices.append(
                {
                    "index": answer.state.index,
                    "message": message,
                    "logprobs": self._logprobs(answer.logprobs),
                    "finish_reason": finish_reason(answer.finish),
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
        if output.text or output.logprobs:
            yield self._chunk(index, {"content": output.text}, output.logprobs)
        if finish is not None:
            ends = {
                "finish_reason": finish_reason(finish),
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

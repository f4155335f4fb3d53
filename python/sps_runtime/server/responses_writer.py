"""Answers of /v1/responses: one builder for whole answers and for events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from sps_runtime.frontend.parsing.answer_parser import AnswerParser
from sps_runtime.frontend.parsing.events import CallArguments, CallBegin, Event, Reasoning, Text
from sps_runtime.frontend.request_state import Finish, Output, RequestState
from sps_runtime.server.error_handlers import describe
from sps_runtime.server.event_stream import Framing, named_event
from sps_runtime.server.openai_common import attention_report
from sps_runtime.server.responses_types import ResponsesBody

Payload = dict[str, Any]


class ResponseWriter:
    """Builds one response, item by item.

    Attributes:
        id: of the response.
    """

    def __init__(
        self, body: ResponsesBody, model: str, state: RequestState, parser: AnswerParser
    ) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self._body = body
        self._model = model
        self._state = state
        self._parser = parser
        self._created = int(time.time())
        self._items: list[Payload] = []
        self._open = ""
        self._number = 0

    def opening(self) -> list[Any]:
        """The first events."""
        response = self.response(None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def events(self, output: Output) -> Iterable[Any]:
        """The events of one output."""
        yield from self.push(output.text, output.finish)
        if output.finish is not None:
            response = self.response(output.finish)
            yield self._event(f"response.{response['status']}", response=response)

    def push(self, text: str, finish: Finish | None) -> Iterable[Payload]:
        """Build on; yields the events of what was built."""
        parsed = self._parser.push(text) if text else []
        if finish is not None:
            parsed += self._parser.finish()
        for event in parsed:
            yield from self._add(event)
        if finish is not None:
            yield from self._close("incomplete" if finish.kind == "length" else "completed")

    def response(self, finish: Finish | None) -> Payload:
        """The response as it stands."""
        status = "in_progress" if finish is None else "completed"
        incomplete = None
        if finish is not None and finish.kind == "length":
            status, incomplete = "incomplete", {"reason": "max_output_tokens"}
        body = self._body
        tools = [_tool(tool) for tool in body.tools or ()]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [_shown(item) for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": msgspec.to_builtins(_format(body))},
            "tool_choice": msgspec.to_builtins(body.tool_choice or "auto"),
            "tools": tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if finish is None else self._usage(),
            "metadata": body.metadata or {},
            **attention_report(finish, self._state),
        }

    def answer(self) -> tuple[str, list[Payload]]:
        """The text and the calls that were built, for the next turn."""
        texts = [item["text"] for item in self._items if item["type"] == "message"]
        return "".join(texts), [item for item in self._items if item["type"] == "function_call"]

    def _add(self, event: Event) -> Iterable[Payload]:
        """A delta, in an item of its kind."""
        match event:
            case Text(text):
                kind, name = "message", "response.output_text.delta"
            case Reasoning(text):
                kind, name = "reasoning", "response.reasoning_text.delta"
            case CallBegin(index, call_id, function):
                yield from self._begin(f"call {index}", call_id=call_id, name=function)
                return
            case CallArguments(index, text):
                kind, name = f"call {index}", "response.function_call_arguments.delta"
        if kind != self._open:
            yield from self._begin(kind)
        item = self._items[-1]
        item["text"] += text
        more: Payload = {"logprobs": []} if kind == "message" else {}
        yield self._part(name, delta=text, **more)

    def _begin(self, kind: str, **fields: str) -> Iterable[Payload]:
        yield from self._close("completed")
        self._open = kind
        prefix = {"message": "msg", "reasoning": "rs"}.get(kind, "fc")
        kind = kind if prefix != "fc" else "function_call"
        item = {"type": kind, "id": f"{prefix}_{secrets.token_hex(12)}", "text": "", **fields}
        self._items.append({**item, "status": "in_progress"})
        yield self._item("response.output_item.added")
        if kind != "function_call":
            yield self._part("response.content_part.added", part=_content(self._items[-1]))

    def _close(self, status: str) -> Iterable[Payload]:
        if not self._open:
            return
        self._open = ""
        item = self._items[-1]
        item["status"] = status
        text = item["text"]
        if item["type"] == "function_call":
            name = "response.function_call_arguments.done"
            yield self._part(name, arguments=text, name=item["name"])
        else:
            is_text = item["type"] == "message"
            name = "response.output_text.done" if is_text else "response.reasoning_text.done"
            yield self._part(name, text=text, **({"logprobs": []} if is_text else {}))
            yield self._part("response.content_part.done", part=_content(item))
        yield self._item("response.output_item.done")

    def _item(self, name: str) -> Payload:
        index = len(self._items) - 1
        return self._event(name, output_index=index, item=_shown(self._items[-1]))

    def _part(self, event: str, **fields: Any) -> Payload:
        item, where = self._items[-1], {"output_index": len(self._items) - 1}
        if item["type"] != "function_call":
            where["content_index"] = 0
        return self._event(event, item_id=item["id"], **where, **fields)

    def _event(self, kind: str, **fields: Any) -> Payload:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _usage(self) -> Payload:
        state = self._state
        return {
            "input_tokens": state.prompt_tokens,
            "input_tokens_details": {"cached_tokens": state.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": state.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": state.prompt_tokens + state.completion_tokens,
        }


def _content(item: Payload) -> Payload:
    if item["type"] == "reasoning":
        return {"type": "reasoning_text", "text": item["text"]}
    return {"type": "output_text", "text": item["text"], "annotations": [], "logprobs": []}


def _shown(item: Payload) -> Payload:
    """An item as clients see it."""
    shown = {key: item[key] for key in ("type", "id", "status")}
    if item["type"] == "function_call":
        call = {key: item[key] for key in ("call_id", "name")}
        return {**shown, **call, "arguments": item["text"]}
    empty = item["status"] == "in_progress" and not item["text"]
    content = [] if empty else [_content(item)]
    if item["type"] == "reasoning":
        return {**shown, "summary": [], "content": content}
    return {**shown, "role": "assistant", "content": content}


def _tool(tool: Any) -> Payload:
    values: Payload = msgspec.to_builtins(tool)
    return {**values, "strict": bool(values["strict"])}


def _format(body: ResponsesBody) -> Any:
    told = body.text.format if body.text is not None else None
    if told is None or told.type != "json_schema":
        return {"type": "text" if told is None else told.type}
    return {
        "type": told.type,
        "name": told.name or "",
        "schema": told.schema,
        "strict": told.strict,
    }


def _failed(error: Exception) -> bytes:
    fields = describe(error)[1]["error"]
    told = {key: fields[key] for key in ("code", "message", "param")}
    return named_event({"type": "error", "sequence_number": 0, **told})


RESPONSES = Framing(named_event, _failed)
"""Every event has the name that its type is."""

"""Conversations as clients write them, and as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from sps_runtime.frontend.query import ChatPrompt
from sps_runtime.server.tools import parsed_arguments
from sps_runtime.types.errors import InvalidRequest

TEMPLATE_VARIABLES = ("enable_thinking", "add_generation_prompt")
"""Template variables that a request may set, to scalars."""


class ContentPart(msgspec.Struct):
    """One part of a message; text is the only kind there is here."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the model made before."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None


def chat_prompt(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> ChatPrompt:
    """Return the conversation as a template takes it: every content is one text.

    Raises:
        InvalidRequest: for no messages, or parts of another kind than text.
    """
    if not messages:
        raise InvalidRequest("messages is empty", field="messages")
    return ChatPrompt([_plain(message, i) for i, message in enumerate(messages)], variables, tools)


def _plain(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.function_call:
        field = f"{where}.function_call"
        raise InvalidRequest(
            f"{field} is not supported by this server", field=field, code="unsupported_option"
        )
    if message.tool_calls and message.role != "assistant":
        field = f"{where}.tool_calls"
        raise InvalidRequest(f"{field}: only an assistant calls tools", field=field)
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text_of(message, f"{where}.content")}
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if message.role == "assistant" and message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    if message.role == "tool":
        named = {"tool_call_id": message.tool_call_id, "name": message.name}
        plain.update({key: value for key, value in named.items() if value})
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    arguments = parsed_arguments(call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.tool_calls:
            return ""
        raise InvalidRequest(f"{where} is missing", field=where)
    for i, part in enumerate(message.content):
        if part.type not in ("text", "input_text") or part.text is None:
            field = f"{where}[{i}].type"
            raise InvalidRequest(
                f"{field}: this server takes text only", field=field, code="unsupported_content"
            )
    return "\n".join(part.text for part in message.content if part.text is not None)


def template_variables(told: Mapping[str, Any] | None, opening: bool | None) -> dict[str, Any]:
    """Return the template variables that a request sets.

    Args:
        told: ``chat_template_kwargs``.
        opening: ``add_generation_prompt``.

    Raises:
        InvalidRequest: for names that are not in `TEMPLATE_VARIABLES` and values that are no
            scalars.
    """
    variables = dict(told or {})
    for name, value in variables.items():
        if name not in TEMPLATE_VARIABLES or not isinstance(value, bool | int | float | str):
            field = "chat_template_kwargs"
            raise InvalidRequest(
                f"{field} may set {' and '.join(TEMPLATE_VARIABLES)}, to scalars", field=field
            )
    if opening is not None:
        variables["add_generation_prompt"] = opening
    return variables

"""Items of /v1/responses as messages that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sps_runtime.server.responses_types import Item, Part
from sps_runtime.server.tools import parsed_arguments
from sps_runtime.types.errors import InvalidRequest

Messages = list[dict[str, Any]]
_TEXTS = ("input_text", "output_text", "text")


def messages_of(given: str | Sequence[Item], names: dict[str, str]) -> Messages:
    """Return the messages of an ``input``.

    Args:
        names: functions by the ids of their calls; those of this input are added.

    Raises:
        InvalidRequest: for items and parts that are no text and no function's.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: Messages = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if item.type == "message":
            messages.append(_message(item, where))
        elif item.type == "function_call":
            names[item.call_id or ""] = item.name or ""
            add_call(messages, item.call_id or "", item.name or "", item.arguments or "")
        elif item.type == "function_call_output":
            called = item.call_id or ""
            content = _text(item.output, f"{where}.output")
            result = {"role": "tool", "content": content, "tool_call_id": called}
            messages.append({**result, "name": names.get(called, "")})
        elif item.type != "reasoning":  # reasoning of former turns is not repeated
            field = f"{where}.type"
            raise InvalidRequest(
                f"{field}: this server takes messages, function calls and their outputs",
                field=field,
                code="unsupported_content",
            )
    return messages


def add_call(messages: Messages, call_id: str, name: str, arguments: str) -> None:
    """Add a call to the assistant's turn that ends `messages`, or begin one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": name, "arguments": parsed_arguments(arguments)}
    call = {"id": call_id, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _message(item: Item, where: str) -> dict[str, Any]:
    if item.role is None:
        raise InvalidRequest(f"{where}.role is missing", field=f"{where}.role")
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": _text(item.content, f"{where}.content")}


def _text(content: str | Sequence[Part] | None, where: str) -> str:
    if content is None:
        raise InvalidRequest(f"{where} is missing", field=where)
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in _TEXTS or part.text is None:
            field = f"{where}[{index}].type"
            raise InvalidRequest(
                f"{field}: this server takes text only", field=field, code="unsupported_content"
            )
    return "\n".join(part.text or "" for part in content)

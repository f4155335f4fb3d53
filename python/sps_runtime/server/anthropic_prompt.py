"""A conversation in Anthropic's words, as chat templates take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sps_runtime.frontend.query import ChatPrompt
from sps_runtime.server.anthropic_types import Block, CountBody, Turn
from sps_runtime.server.tools import Toolbox
from sps_runtime.types.errors import InvalidRequest

_SAID = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use", "thinking")}
_HIDDEN = ("redacted_thinking",)


def anthropic_prompt(body: CountBody, toolbox: Toolbox) -> ChatPrompt:
    """Return the conversation.

    Raises:
        InvalidRequest: for no messages, or content that is no text and no tool's.
    """
    if not body.messages:
        raise InvalidRequest("messages is empty", field="messages")
    if body.messages[-1].role == "assistant":
        raise InvalidRequest(
            "messages must not end with the assistant's turn: it is not continued here",
            field="messages",
            code="unsupported_option",
        )
    messages: list[dict[str, Any]] = []
    if body.system:
        text = _text(body.system, "system")
        messages.append({"role": "system", "content": text})
    names: dict[str, str] = {}
    for index, turn in enumerate(body.messages):
        messages += _plain(turn, f"messages[{index}]", names)
    variables = {}
    if body.thinking is not None:
        variables["enable_thinking"] = body.thinking.type != "disabled"
    return ChatPrompt(messages, variables, toolbox.described())


def _plain(turn: Turn, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    """The messages of a turn; `names` remembers which tool each call was of."""
    if isinstance(turn.content, str) or turn.role == "system":
        return [{"role": turn.role, "content": _text(turn.content, f"{where}.content")}]
    _check(turn.content, _SAID[turn.role], f"{where}.content")
    if turn.role == "assistant":
        return [_assistant(turn.content, names)]
    messages: list[dict[str, Any]] = []
    for i, block in enumerate(turn.content):
        if block.type == "tool_result":
            content = _text(block.content or "", f"{where}.content[{i}].content")
            called = block.tool_use_id or ""
            result = {"role": "tool", "content": content, "tool_call_id": called}
            messages.append({**result, "name": names.get(called, "")})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + (block.text or "")
        else:
            messages.append({"role": "user", "content": block.text or ""})
    return messages


def _assistant(blocks: Sequence[Block], names: dict[str, str]) -> dict[str, Any]:
    text = "\n".join(block.text or "" for block in blocks if block.type == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text}
    thought = "\n".join(block.thinking or "" for block in blocks if block.type == "thinking")
    if thought:
        message["reasoning_content"] = thought
    calls = [block for block in blocks if block.type == "tool_use"]
    for call in calls:
        names[call.id or ""] = call.name or ""
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.name or "", "arguments": call.input or {}},
            }
            for call in calls
        ]
    return message


def _text(content: str | Sequence[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    _check(content, ("text",), where)
    return "\n".join(block.text or "" for block in content)


def _check(blocks: Sequence[Block], kinds: Sequence[str], where: str) -> None:
    for i, block in enumerate(blocks):
        if block.type in kinds:
            if block.type == "text" and block.text is None:
                raise InvalidRequest(f"{where}[{i}].text is missing", field=f"{where}[{i}].text")
        elif block.type not in _HIDDEN:
            field = f"{where}[{i}].type"
            raise InvalidRequest(
                f"{field}: this server takes {', '.join(kinds)} here",
                field=field,
                code="unsupported_content",
            )

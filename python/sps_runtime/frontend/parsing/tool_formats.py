"""How models write tool calls: the formats of Hermes and Qwen, Llama 3, and Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sps_runtime.types.errors import ConfigError


@dataclass(frozen=True)
class ToolFormat:
    """One format.

    Attributes:
        markers: each opens one or more calls; the first one is the one that a grammar writes.
        before, between, after: what a grammar writes around calls, markers aside.
        closing: what ends the calls of a marker, "" for nothing.
        marker_per_call: in what a grammar writes, every call has its own marker and closing.
        arguments: the arguments' key in a call.
        bare: an answer that begins with a brace is a call without marker.
        plain_name: after a marker may stand the function's name, then its arguments alone.
        special_tokens: markers are special tokens: their text must not be skipped.
        id_length: characters of a call's id; 0 for OpenAI's kind.
    """

    markers: tuple[str, ...]
    before: str
    between: str
    after: str
    closing: str = ""
    marker_per_call: bool = False
    arguments: str = "arguments"
    bare: bool = False
    plain_name: bool = False
    special_tokens: bool = False
    id_length: int = 0


HERMES = ToolFormat(
    markers=("<tool_call>",),
    before="\n",
    between="\n",
    after="\n</tool_call>",
    closing="</tool_call>",
    marker_per_call=True,
)
LLAMA3 = ToolFormat(
    markers=("<|python_tag|>",),
    before="",
    between="; ",
    after="",
    arguments="parameters",
    bare=True,
    special_tokens=True,
)
MISTRAL = ToolFormat(
    markers=("[TOOL_CALLS]",),
    before="[",
    between=", ",
    after="]",
    closing="]",
    plain_name=True,
    special_tokens=True,
    id_length=9,
)
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen25": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}


def find_tool_format(name: str, template: str) -> ToolFormat | None:
    """The format called `name`; None for ``none``; "" tells it from the chat template.

    Raises:
        ConfigError: for a name that nobody knows.
    """
    if name in TOOL_FORMATS:
        return TOOL_FORMATS[name]
    if name == "none":
        return None
    if name:
        known = ", ".join([*TOOL_FORMATS, "none"])
        raise ConfigError(f"unknown tool call parser {name!r}; known: {known}")
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA3 if "<|python_tag|>" in template else HERMES

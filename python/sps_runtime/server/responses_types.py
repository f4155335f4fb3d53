"""Bodies of /v1/responses."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.frontend.query import SamplingOptions
from sps_runtime.server.grammars import Grammar, given
from sps_runtime.server.sampling_fields import SamplingFields
from sps_runtime.server.tools import Choice, Function, NamedFunction, NamedTool, Tool, as_tools
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.grammar import ANY_JSON_OBJECT


class Part(msgspec.Struct, kw_only=True):
    """A piece of an item's content."""

    type: str
    text: str | None = None


class Item(msgspec.Struct, kw_only=True):
    """An item of ``input``; which fields mean something depends on its type."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    """A tool; only functions of one's own exist here."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(msgspec.Struct, kw_only=True):
    """A ``tool_choice`` that names the one function to call."""

    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct, kw_only=True):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"]
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``text``."""

    format: TextFormat | None = None


class ResponsesBody(SamplingFields, kw_only=True):
    """POST /v1/responses."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Choice | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    attention: AttentionOptions | None = None

    def sampling(self) -> SamplingOptions:
        """Return the options in the gate's words."""
        return self.sampling_options(self.max_output_tokens)

    def grammar(self) -> Grammar | None:
        """Return what ``text.format`` asks for."""
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return given("text.format", "json_schema", ANY_JSON_OBJECT)
        if form.schema is None:
            raise InvalidRequest("text.format.schema is missing", field="text.format.schema")
        return given("text.format.schema", "json_schema", form.schema)

    def openai_tools(self) -> list[Tool]:
        """The tools in the words of the other routes.

        Raises:
            InvalidRequest: for tools that only OpenAI's servers have.
        """
        told = [
            (
                tool.type,
                Function(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=tool.strict,
                ),
            )
            for tool in self.tools or ()
        ]
        return as_tools(told, ("function",), "only functions are supported")

    def openai_choice(self) -> Choice | NamedTool | None:
        """The choice in the words of the other routes."""
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            return NamedTool(function=NamedFunction(choice.name))
        return choice

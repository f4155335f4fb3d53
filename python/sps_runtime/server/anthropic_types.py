"""Bodies of Anthropic's routes, and conversations in Anthropic's words."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.frontend.query import SamplingOptions
from sps_runtime.server.grammars import Grammar, given
from sps_runtime.server.tools import Choice, Function, NamedFunction, NamedTool, Tool, as_tools
from sps_runtime.types.errors import InvalidRequest


class Block(msgspec.Struct, kw_only=True):
    """A piece of content; which fields mean something depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Turn(msgspec.Struct, kw_only=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct, kw_only=True):
    """A tool of one's own; tools that Anthropic's servers run do not exist here."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """``thinking``: whether the template opens reasoning. There is no budget to keep to."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(msgspec.Struct, kw_only=True):
    """``output_config.format``."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``output_config``."""

    format: OutputFormat | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @property
    def parallel(self) -> bool:
        choice = self.tool_choice
        return choice is None or not choice.disable_parallel_tool_use

    def grammar(self) -> Grammar | None:
        """Return what ``output_config`` asks for."""
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = self.output_config.format.schema
        return given("output_config.format.schema", "json_schema", schema)

    def openai_tools(self) -> list[Tool]:
        """The tools in the words of the other routes.

        Raises:
            InvalidRequest: for tools that only Anthropic's servers have.
        """
        told = [
            (
                tool.type,
                Function(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.input_schema,
                    strict=tool.strict,
                ),
            )
            for tool in self.tools or ()
        ]
        return as_tools(told, (None, "custom"), "only tools of one's own are supported")

    def openai_choice(self) -> Choice | NamedTool | None:
        """The choice in the words of the other routes."""
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            if choice.name is None:
                raise InvalidRequest("tool_choice.name is missing", field="tool_choice.name")
            return NamedTool(function=NamedFunction(choice.name))
        return "required" if choice.type == "any" else choice.type


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    attention: AttentionOptions | None = None

    def sampling(self) -> SamplingOptions:
        """Return the options in the gate's words."""
        return SamplingOptions(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )

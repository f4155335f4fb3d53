"""Bodies of OpenAI's routes, with the further options that SGLang's clients send."""

from __future__ import annotations

from typing import Any

import msgspec

from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.frontend.query import Prompt, SamplingOptions, TextPrompt, TokenPrompt
from sps_runtime.server.body import Prompts, decode, nothing
from sps_runtime.server.chat_messages import Message
from sps_runtime.server.grammars import GrammarFields
from sps_runtime.server.tools import Choice, NamedTool, Tool
from sps_runtime.types.errors import InvalidRequest


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool | None = None


class OpenAIBody(GrammarFields, kw_only=True):
    """What both routes have in common."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | list[str] | None = None
    attention: AttentionOptions | None = None

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int | None) -> SamplingOptions:
        """Return the options in the gate's words."""
        return self.sampling_options(max_new_tokens, self.n)


class CompletionBody(OpenAIBody, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts = msgspec.field(default_factory=nothing)
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(OpenAIBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def as_prompt(given: str | list[int], add_special_tokens: bool | None = None) -> Prompt:
    """Text or token ids as the gate wants them."""
    if isinstance(given, str):
        return TextPrompt(given, add_special_tokens is not False)
    return TokenPrompt(given)


def parse_prompts(raw: msgspec.Raw, field: str) -> list[str | list[int]]:
    """Decode ``str | list[str] | list[int] | list[list[int]]``; a single prompt is a list of one.

    Raises:
        InvalidRequest: for anything else, and for an empty list.
    """
    text = bytes(raw).lstrip()
    if text.startswith(b'"'):
        return [decode(raw, str, field=field)]
    inner = text[1:].lstrip()[:1] if text.startswith(b"[") else b""
    if inner == b'"':
        return list(decode(raw, list[str], field=field))
    if inner == b"[":
        return list(decode(raw, list[list[int]], field=field))
    if inner and inner != b"]":
        return [decode(raw, list[int], field=field)]
    if text in (b"null", b"") or inner == b"]":
        raise InvalidRequest(f"{field} is empty", field=field)
    raise InvalidRequest(f"{field} must be text, token ids, or a list of either", field=field)

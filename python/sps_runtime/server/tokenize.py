"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import ASGIApp

from sps_runtime.frontend.query import ChatPrompt, Query, TextPrompt
from sps_runtime.frontend.validation import check_ids
from sps_runtime.server.admin import as_json
from sps_runtime.server.body import IdLists, decode, is_nothing, nothing
from sps_runtime.server.chat_messages import Message, chat_prompt, template_variables
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.server.tools import Tool, make_toolbox
from sps_runtime.types.errors import InvalidRequest


class TokenizeBody(msgspec.Struct):
    """POST /tokenize."""

    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct):
    """POST /detokenize."""

    tokens: IdLists = msgspec.field(default_factory=nothing)
    skip_special_tokens: bool | None = None
    model: str | None = None


async def tokenize(call: Call) -> ASGIApp:
    """Text or a conversation to ids."""
    service = call.service
    manager = service.manager
    body, headers = await read_request(call, TokenizeBody)
    service.check_model(body.model)
    prompts = _prompts(call, body)
    if len(prompts) > manager.limits.max_prompts:
        raise InvalidRequest("prompt holds too many texts", field="prompt")
    names = {"prompt": "prompt" if body.messages is None else "messages"}
    tokens = [list(await manager.tokenize(Query(prompt=p, names=names))) for p in prompts]
    counts = [len(ids) for ids in tokens]
    single = not isinstance(body.prompt, list)
    return as_json(
        {
            "tokens": tokens[0] if single else tokens,
            "count": counts[0] if single else counts,
            "max_model_len": manager.limits.context_length,
        },
        headers=headers,
    )


def _prompts(call: Call, body: TokenizeBody) -> list[TextPrompt | ChatPrompt]:
    if body.messages is not None and body.prompt is None:
        toolbox = make_toolbox(call.service, body.tools, None, None)
        variables = template_variables(body.chat_template_kwargs, body.add_generation_prompt)
        return [chat_prompt(body.messages, variables, toolbox.described())]
    if body.messages is not None or body.prompt is None or body.prompt == []:
        raise InvalidRequest("give prompt or messages", field="prompt")
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return [TextPrompt(text, body.add_special_tokens is not False) for text in texts]


async def detokenize(call: Call) -> ASGIApp:
    """Ids to text."""
    service = call.service
    limits = service.manager.limits
    body, headers = await read_request(call, DetokenizeBody)
    service.check_model(body.model)
    if is_nothing(body.tokens):
        raise InvalidRequest("tokens is empty", field="tokens")
    nested = bytes(body.tokens).lstrip()[1:].lstrip().startswith(b"[")
    kind = list[list[int]] if nested else list[int]
    ids = decode(body.tokens, kind, field="tokens")
    batch = ids if nested else [ids]
    for one in batch:
        check_ids(one, limits.vocab_size, "tokens")
    skip = body.skip_special_tokens is not False
    texts = [service.manager.tokenizer.decode(one, skip_special_tokens=skip) for one in batch]
    return as_json({"text": texts if nested else texts[0]}, headers=headers)

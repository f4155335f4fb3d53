"""POST /v1/embeddings and /encode: the last token's hidden state as a vector."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from starlette.types import ASGIApp

from sps_runtime.frontend.attention_options import FIELD as ATTENTION
from sps_runtime.frontend.attention_options import AttentionOptions, report_fields
from sps_runtime.frontend.query import Prompt, Query
from sps_runtime.server.admin import as_json
from sps_runtime.server.answers import Answer, complete_many
from sps_runtime.server.auth import Identity
from sps_runtime.server.body import Prompts, nothing
from sps_runtime.server.openai_common import attention_report, labels_of, usage
from sps_runtime.server.openai_types import as_prompt, parse_prompts
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.server.sglang_types import EncodeBody
from sps_runtime.server.vectors import as_base64, vector_of
from sps_runtime.types.errors import InvalidRequest

MAX_INPUTS = 2048
"""Of one request, as at OpenAI; they run as many at a time as a batch may have."""


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings.

    Attributes:
        normalize: divide the vector by its length; true unless told.
    """

    input: Prompts = msgspec.field(default_factory=nothing)
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    rid: str | list[str] | None = None
    attention: AttentionOptions | None = None
    add_special_tokens: bool | None = None


async def embeddings(call: Call) -> ASGIApp:
    """Vectors of texts or token ids, in OpenAI's form."""
    service = call.service
    body, headers = await read_request(call, EmbeddingsBody)
    service.check_model(body.model)
    prompts = parse_prompts(body.input, "input")
    check_count("input", len(prompts))
    labels = labels_of(body.rid, len(prompts))
    attention = (ATTENTION, body.attention)
    queries = [
        _query(call.identity, as_prompt(prompt, body.add_special_tokens), label, "input", attention)
        for prompt, label in zip(prompts, labels, strict=True)
    ]
    answers = await complete_many(call, queries)
    cache_report = service.server.enable_cache_report
    content = {
        "object": "list",
        "data": [_item(index, answer, body) for index, answer in enumerate(answers)],
        "model": body.model or service.model_name,
        "usage": usage([answer.state for answer in answers], 1, cache_report=cache_report),
    }
    return as_json(content, headers=headers)


async def encode(call: Call) -> ASGIApp:
    """Vectors of texts or token ids, in SGLang's form: one answer, or a list for a list."""
    body, headers = await read_request(call, EncodeBody)
    call.service.check_model(body.model)
    answers = await complete_many(call, encode_queries(call.identity, body))
    content = [encoded(answer, normalize=body.normalize is not False) for answer in answers]
    return as_json(content if body.is_batch else content[0], headers=headers)


def encode_queries(identity: Identity, body: EncodeBody) -> list[Query]:
    """What a native body asks for, one query per prompt."""
    field, prompts = body.prompts()
    check_count(field, len(prompts))
    labels = labels_of(body.rid, len(prompts))
    attentions = body.attentions(len(prompts))
    return [
        _query(identity, as_prompt(prompt), label, field, attention)
        for prompt, label, attention in zip(prompts, labels, attentions, strict=True)
    ]


def check_count(field: str, count: int) -> None:
    """Raise `InvalidRequest` for more than one request may bring."""
    if count > MAX_INPUTS:
        raise InvalidRequest(f"{field} must hold 1 to {MAX_INPUTS} prompts", field=field)


def _query(
    identity: Identity,
    prompt: Prompt,
    label: str,
    field: str,
    attention: tuple[str, AttentionOptions | None],
) -> Query:
    return Query(
        prompt=prompt,
        attention=attention[1],
        tenant=identity.tenant,
        owner=identity.owner,
        label=label,
        names={"prompt": field, ATTENTION: attention[0]},
        hidden_state=True,
    )


def _item(index: int, answer: Answer, body: EmbeddingsBody) -> dict[str, Any]:
    vector = vector_of(answer.state.hidden_state, normalize=body.normalize is not False)
    return {
        "object": "embedding",
        "index": index,
        "embedding": as_base64(vector) if body.encoding_format == "base64" else vector.tolist(),
        **attention_report(answer.finish, answer.state),
    }


def encoded(answer: Answer, *, normalize: bool) -> dict[str, Any]:
    """One vector as SGLang answers it."""
    state = answer.state
    meta = {
        "id": state.label,
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": state.prompt_tokens,
        "completion_tokens": 0,
        "cached_tokens": state.cached_tokens,
        "weight_version": "default",
        "num_retractions": state.retractions,
        "e2e_latency": state.total_s,
    }
    if state.attention is not None:
        meta["attention"] = report_fields(state.attention)
    vector = vector_of(state.hidden_state, normalize=normalize)
    return {"embedding": vector.tolist(), "meta_info": meta}

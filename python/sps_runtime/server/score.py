"""POST /v1/score: how likely given tokens are to follow a query and each of some items."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
from starlette.types import ASGIApp

from sps_runtime.frontend.attention_options import FIELD as ATTENTION
from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.frontend.query import (
    LogprobOptions,
    Prompt,
    Query,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)
from sps_runtime.server.admin import as_json
from sps_runtime.server.answers import Answer, complete_many
from sps_runtime.server.auth import Identity
from sps_runtime.server.body import Prompts, nothing
from sps_runtime.server.embeddings import check_count
from sps_runtime.server.openai_common import usage
from sps_runtime.server.openai_types import parse_prompts
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.types.errors import InvalidRequest

_ONE_TOKEN = SamplingOptions(max_new_tokens=1, temperature=0.0, ignore_eos=True)


class ScoreBody(msgspec.Struct, kw_only=True):
    """POST /v1/score.

    Attributes:
        query: text or token ids; items are of the same kind.
        items: one or several.
        label_token_ids: the tokens whose probability is wanted.
        apply_softmax: probabilities among the labels alone; otherwise in the whole vocabulary.
        item_first: the item stands before the query.
    """

    query: str | list[int] | None = None
    items: Prompts = msgspec.field(default_factory=nothing)
    label_token_ids: list[int] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    model: str | None = None
    attention: AttentionOptions | None = None


async def score(call: Call) -> ASGIApp:
    """One list of scores for each item, in the order of the labels."""
    service = call.service
    body, headers = await read_request(call, ScoreBody)
    service.check_model(body.model)
    answers = await complete_many(call, score_queries(call.identity, body))
    cache_report = service.server.enable_cache_report
    content: dict[str, Any] = {
        "object": "scoring",
        "scores": [scores_of(answer, body) for answer in answers],
        "model": body.model or service.model_name,
        "created": int(time.time()),
        "usage": usage([answer.state for answer in answers], 1, cache_report=cache_report),
    }
    return as_json(content, headers=headers)


def score_queries(identity: Identity, body: ScoreBody) -> list[Query]:
    """What a body asks for, one query per item."""
    labels = body.label_token_ids or []
    if not labels:
        raise InvalidRequest("label_token_ids is empty", field="label_token_ids")
    prompts = _prompts(body)
    check_count("items", len(prompts))
    return [_query(identity, body, labels, prompt) for prompt in prompts]


def _prompts(body: ScoreBody) -> list[Prompt]:
    """Query and item in one, for each item. Raises InvalidRequest when their kinds differ."""
    items = parse_prompts(body.items, "items")
    query: str | list[int] = body.query or ("" if isinstance(items[0], str) else [])
    prompts: list[Prompt] = []
    for item in items:
        first, second = (item, query) if body.item_first else (query, item)
        if isinstance(first, str) and isinstance(second, str):
            prompts.append(TextPrompt(first + second))
        elif isinstance(first, list) and isinstance(second, list):
            prompts.append(TokenPrompt(first + second))
        else:
            raise InvalidRequest("query and items must both be text or token ids", field="items")
    return prompts


def _query(identity: Identity, body: ScoreBody, labels: list[int], prompt: Prompt) -> Query:
    return Query(
        prompt=prompt,
        options=_ONE_TOKEN,
        logprobs=LogprobOptions(0, labels),
        attention=body.attention,
        tenant=identity.tenant,
        owner=identity.owner,
        names={
            "prompt": "items",
            "max_new_tokens": "items",
            "token_ids_logprob": "label_token_ids",
            ATTENTION: ATTENTION,
        },
    )


def scores_of(answer: Answer, body: ScoreBody) -> list[float]:
    """Probabilities of the labels, one of them perhaps several times."""
    logprobs, labels = dict(answer.logprobs[0].wanted), body.label_token_ids or []
    highest = max(logprobs.values()) if body.apply_softmax else 0.0
    weights = [math.exp(logprobs[label] - highest) for label in labels]
    total = sum(weights) if body.apply_softmax else 1.0
    return [weight / total for weight in weights]

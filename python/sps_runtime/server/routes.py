"""The table of routes.

``python -m sps_runtime.server.routes > docs/openapi.json`` writes down what it says.
"""

from __future__ import annotations

import sys

from sps_runtime.server import admin, probes, progress, responses, tokenize
from sps_runtime.server.admin import AbortBody
from sps_runtime.server.anthropic_messages import count_tokens, messages
from sps_runtime.server.anthropic_types import CountBody, MessagesBody
from sps_runtime.server.auth import Access
from sps_runtime.server.embeddings import EmbeddingsBody, embeddings, encode
from sps_runtime.server.openai_chat import chat_completions
from sps_runtime.server.openai_completions import completions
from sps_runtime.server.openai_types import ChatBody, CompletionBody
from sps_runtime.server.openapi import encoded, openapi
from sps_runtime.server.options import (
    ANTHROPIC,
    EMBEDDING,
    NATIVE,
    OPENAI,
    RESPONSES_API,
    TOKENIZE,
    Accepts,
)
from sps_runtime.server.responses_types import ResponsesBody
from sps_runtime.server.route import Handler, RouteSpec
from sps_runtime.server.score import ScoreBody, score
from sps_runtime.server.sglang_generate import generate
from sps_runtime.server.sglang_types import EncodeBody, GenerateBody
from sps_runtime.server.tokenize import DetokenizeBody, TokenizeBody

_GET, _POST = ("GET",), ("POST",)
_EITHER, _PUT = ("GET", "POST"), ("POST", "PUT")
_TEXT = "text/plain"


def _probe(path: str, handler: Handler, summary: str, methods: tuple[str, ...] = _GET) -> RouteSpec:
    return RouteSpec(path, methods, Access.PUBLIC, handler, summary=summary)


def _read(
    path: str,
    handler: Handler,
    summary: str,
    methods: tuple[str, ...] = _GET,
    answers: str = "application/json",
) -> RouteSpec:
    return RouteSpec(path, methods, Access.USER, handler, summary=summary, answers=answers)


def _manage(path: str, handler: Handler, summary: str) -> RouteSpec:
    return RouteSpec(path, _EITHER, Access.ADMIN, handler, summary=summary, answers=_TEXT)


def _send(
    path: str,
    handler: Handler,
    accepts: Accepts,
    summary: str,
    methods: tuple[str, ...] = _POST,
) -> RouteSpec:
    return RouteSpec(path, methods, Access.USER, handler, accepts, summary)


ROUTES = (
    _probe("/livez", probes.livez, "The event loop turns"),
    _probe("/readyz", probes.readyz, "New requests are taken"),
    _probe("/ready", probes.readyz, "New requests are taken"),
    _probe("/health", probes.health, "The engine beats"),
    _probe("/ping", probes.health, "The engine beats", _EITHER),
    _probe("/health_generate", probes.health_generate, "One real token"),
    RouteSpec(
        "/metrics",
        _GET,
        Access.PUBLIC,
        probes.metrics,
        summary="Prometheus metrics, with --enable-metrics",
        answers=_TEXT,
    ),
    _send(
        "/v1/completions",
        completions,
        Accepts(CompletionBody, OPENAI),
        "Complete text or token ids",
    ),
    _send(
        "/v1/chat/completions",
        chat_completions,
        Accepts(ChatBody, OPENAI),
        "Answer a conversation",
    ),
    _send(
        "/v1/responses",
        responses.create_response,
        Accepts(ResponsesBody, RESPONSES_API),
        "Answer text or items with items",
    ),
    _read("/v1/responses/{response}", responses.get_response, "A former response"),
    _read(
        "/v1/responses/{response}",
        responses.delete_response,
        "Forget a former response",
        ("DELETE",),
    ),
    _send("/v1/messages", messages, Accepts(MessagesBody, ANTHROPIC), "Answer a conversation"),
    _send(
        "/v1/messages/count_tokens",
        count_tokens,
        Accepts(CountBody, ANTHROPIC),
        "How long a conversation's prompt is",
    ),
    _send(
        "/v1/embeddings",
        embeddings,
        Accepts(EmbeddingsBody, EMBEDDING),
        "The hidden state of each input's last token",
    ),
    _send(
        "/v1/score",
        score,
        Accepts(ScoreBody, EMBEDDING),
        "How likely given tokens are to follow a query and items",
    ),
    _read("/v1/models", admin.list_models, "The served model"),
    _read("/v1/models/{model:path}", admin.get_model, "The served model by its name"),
    _read("/v1/progress/{id}", progress.progress, "How far a running request is"),
    _read("/v1/loads", admin.loads, "Running and waiting requests, tokens in use"),
    _send("/generate", generate, Accepts(GenerateBody, NATIVE), "SGLang's native request", _PUT),
    _send("/encode", encode, Accepts(EncodeBody, EMBEDDING), "SGLang's request of a vector", _PUT),
    _send(
        "/tokenize", tokenize.tokenize, Accepts(TokenizeBody, TOKENIZE), "Ids of text or messages"
    ),
    _send("/detokenize", tokenize.detokenize, Accepts(DetokenizeBody), "Text of ids"),
    _read("/get_model_info", admin.model_info, "Path and kind of the model"),
    _read("/model_info", admin.model_info, "Path and kind of the model"),
    _read("/get_server_info", admin.server_info, "Settings without secrets, pages, counters"),
    _read("/server_info", admin.server_info, "Settings without secrets, pages, counters"),
    _read("/flush_cache", admin.flush_cache, "Drop the prefix cache", _EITHER, _TEXT),
    _manage("/start_profile", admin.start_profile, "Go on with the timeline of --trace-file"),
    _manage("/stop_profile", admin.stop_profile, "Pause the timeline of --trace-file"),
    _send("/abort_request", admin.abort_request, Accepts(AbortBody), "End running requests"),
    _read(
        "/concate_and_append_request",
        admin.concatenate_and_append,
        "SGLang's hint to join branches: the cache does it by itself",
        _POST,
    ),
    _read("/openapi.json", openapi, "This document"),
)

if __name__ == "__main__":
    sys.stdout.buffer.write(encoded(ROUTES))

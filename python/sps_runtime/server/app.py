"""The application: one table of routes, each with the access that it asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sps_runtime.server import admin, probes, progress, tokenize
from sps_runtime.server.anthropic_messages import count_tokens, messages
from sps_runtime.server.anthropic_types import CountBody, MessagesBody
from sps_runtime.server.auth import Access, Keys
from sps_runtime.server.embeddings import EmbeddingsBody, embeddings, encode
from sps_runtime.server.error_handlers import handle_error
from sps_runtime.server.openai_chat import chat_completions
from sps_runtime.server.openai_completions import completions
from sps_runtime.server.openai_types import ChatBody, CompletionBody
from sps_runtime.server.options import (
    ANTHROPIC,
    EMBEDDING,
    NATIVE,
    OPENAI,
    RESPONSES_API,
    Accepts,
)
from sps_runtime.server.responses import create_response, delete_response, get_response
from sps_runtime.server.responses_types import ResponsesBody
from sps_runtime.server.score import ScoreBody, score
from sps_runtime.server.service import Call, Service
from sps_runtime.server.sglang_generate import generate
from sps_runtime.server.sglang_types import EncodeBody, GenerateBody

Handler = Callable[[Call], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class RouteSpec:
    """One route. Access has no default: whoever adds a route decides.

    Attributes:
        accepts: what its body may be; None where it has none.
    """

    path: str
    methods: tuple[str, ...]
    access: Access
    handler: Handler
    accepts: Accepts | None = None


_GET, _POST, _BOTH = ("GET",), ("POST",), ("GET", "POST")
_PUT = ("POST", "PUT")
ROUTES = (
    RouteSpec("/livez", _GET, Access.PUBLIC, probes.livez),
    RouteSpec("/readyz", _GET, Access.PUBLIC, probes.readyz),
    RouteSpec("/ready", _GET, Access.PUBLIC, probes.readyz),
    RouteSpec("/health", _GET, Access.PUBLIC, probes.health),
    RouteSpec("/ping", _BOTH, Access.PUBLIC, probes.health),
    RouteSpec("/health_generate", _GET, Access.PUBLIC, probes.health_generate),
    RouteSpec("/metrics", _GET, Access.PUBLIC, probes.metrics),
    RouteSpec("/v1/completions", _POST, Access.USER, completions, Accepts(CompletionBody, OPENAI)),
    RouteSpec(
        "/v1/chat/completions", _POST, Access.USER, chat_completions, Accepts(ChatBody, OPENAI)
    ),
    RouteSpec(
        "/v1/responses",
        _POST,
        Access.USER,
        create_response,
        Accepts(ResponsesBody, RESPONSES_API),
    ),
    RouteSpec("/v1/responses/{response}", _GET, Access.USER, get_response),
    RouteSpec("/v1/responses/{response}", ("DELETE",), Access.USER, delete_response),
    RouteSpec("/v1/messages", _POST, Access.USER, messages, Accepts(MessagesBody, ANTHROPIC)),
    RouteSpec(
        "/v1/messages/count_tokens",
        _POST,
        Access.USER,
        count_tokens,
        Accepts(CountBody, ANTHROPIC),
    ),
    RouteSpec("/v1/embeddings", _POST, Access.USER, embeddings, Accepts(EmbeddingsBody, EMBEDDING)),
    RouteSpec("/v1/score", _POST, Access.USER, score, Accepts(ScoreBody, EMBEDDING)),
    RouteSpec("/v1/models", _GET, Access.USER, admin.list_models),
    RouteSpec("/v1/models/{model:path}", _GET, Access.USER, admin.get_model),
    RouteSpec("/v1/progress/{id}", _GET, Access.USER, progress.progress),
    RouteSpec("/v1/loads", _GET, Access.USER, admin.loads),
    RouteSpec("/generate", _PUT, Access.USER, generate, Accepts(GenerateBody, NATIVE)),
    RouteSpec("/encode", _PUT, Access.USER, encode, Accepts(EncodeBody, EMBEDDING)),
    RouteSpec("/tokenize", _POST, Access.USER, tokenize.tokenize, Accepts(tokenize.TokenizeBody)),
    RouteSpec(
        "/detokenize", _POST, Access.USER, tokenize.detokenize, Accepts(tokenize.DetokenizeBody)
    ),
    RouteSpec("/get_model_info", _GET, Access.USER, admin.model_info),
    RouteSpec("/model_info", _GET, Access.USER, admin.model_info),
    RouteSpec("/get_server_info", _GET, Access.USER, admin.server_info),
    RouteSpec("/server_info", _GET, Access.USER, admin.server_info),
    RouteSpec("/flush_cache", _BOTH, Access.USER, admin.flush_cache),
    RouteSpec("/abort_request", _POST, Access.USER, admin.abort_request, Accepts(admin.AbortBody)),
    RouteSpec("/concate_and_append_request", _POST, Access.USER, admin.concatenate_and_append),
)


class _Endpoint:
    """Checks access for the route that has matched, then runs its handler."""

    def __init__(self, spec: RouteSpec, service: Service, keys: Keys) -> None:
        self._spec = spec
        self._service = service
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            identity = self._keys.identify(request, self._spec.access)
            response = await self._spec.handler(
                Call(request, self._service, identity, self._spec.accepts)
            )
        except Exception as error:  # nothing that one request provokes leaves it
            response = await handle_error(request, error)
        await response(scope, receive, send)


def build_app(service: Service, keys: Keys, routes: Sequence[RouteSpec] = ROUTES) -> Starlette:
    """Return the ASGI application."""
    app = Starlette(
        routes=[
            Route(spec.path, _Endpoint(spec, service, keys), methods=list(spec.methods))
            for spec in routes
        ],
        exception_handlers={HTTPException: handle_error},
    )
    app.router.redirect_slashes = False
    return app

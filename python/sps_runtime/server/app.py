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
from sps_runtime.server.auth import Access, Keys
from sps_runtime.server.error_handlers import handle_error
from sps_runtime.server.openai_chat import chat_completions
from sps_runtime.server.openai_completions import completions
from sps_runtime.server.responses import create_response, delete_response, get_response
from sps_runtime.server.service import Call, Service
from sps_runtime.server.sglang_generate import generate

Handler = Callable[[Call], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class RouteSpec:
    """One route. Access has no default: whoever adds a route decides."""

    path: str
    methods: tuple[str, ...]
    access: Access
    handler: Handler


_GET, _POST, _BOTH = ("GET",), ("POST",), ("GET", "POST")
ROUTES = (
    RouteSpec("/livez", _GET, Access.PUBLIC, probes.livez),
    RouteSpec("/readyz", _GET, Access.PUBLIC, probes.readyz),
    RouteSpec("/ready", _GET, Access.PUBLIC, probes.readyz),
    RouteSpec("/health", _GET, Access.PUBLIC, probes.health),
    RouteSpec("/ping", _BOTH, Access.PUBLIC, probes.health),
    RouteSpec("/health_generate", _GET, Access.PUBLIC, probes.health_generate),
    RouteSpec("/metrics", _GET, Access.PUBLIC, probes.metrics),
    RouteSpec("/v1/completions", _POST, Access.USER, completions),
    RouteSpec("/v1/chat/completions", _POST, Access.USER, chat_completions),
    RouteSpec("/v1/responses", _POST, Access.USER, create_response),
    RouteSpec("/v1/responses/{response}", _GET, Access.USER, get_response),
    RouteSpec("/v1/responses/{response}", ("DELETE",), Access.USER, delete_response),
    RouteSpec("/v1/messages", _POST, Access.USER, messages),
    RouteSpec("/v1/messages/count_tokens", _POST, Access.USER, count_tokens),
    RouteSpec("/v1/models", _GET, Access.USER, admin.list_models),
    RouteSpec("/v1/models/{model:path}", _GET, Access.USER, admin.get_model),
    RouteSpec("/v1/progress/{id}", _GET, Access.USER, progress.progress),
    RouteSpec("/v1/loads", _GET, Access.USER, admin.loads),
    RouteSpec("/generate", ("POST", "PUT"), Access.USER, generate),
    RouteSpec("/tokenize", _POST, Access.USER, tokenize.tokenize),
    RouteSpec("/detokenize", _POST, Access.USER, tokenize.detokenize),
    RouteSpec("/get_model_info", _GET, Access.USER, admin.model_info),
    RouteSpec("/model_info", _GET, Access.USER, admin.model_info),
    RouteSpec("/get_server_info", _GET, Access.USER, admin.server_info),
    RouteSpec("/server_info", _GET, Access.USER, admin.server_info),
    RouteSpec("/flush_cache", _BOTH, Access.USER, admin.flush_cache),
    RouteSpec("/abort_request", _POST, Access.USER, admin.abort_request),
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
            response = await self._spec.handler(Call(request, self._service, identity))
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

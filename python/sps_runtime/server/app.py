"""The application: every route behind its access, every exception an answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sps_runtime.server.auth import Keys
from sps_runtime.server.error_handlers import handle_error
from sps_runtime.server.openapi import encoded
from sps_runtime.server.route import RouteSpec
from sps_runtime.server.routes import ROUTES
from sps_runtime.server.service import Call, Service

__all__ = ["ROUTES", "RouteSpec", "build_app"]


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
    app.state.openapi = cache(partial(encoded, routes))
    return app

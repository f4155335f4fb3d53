"""One route of the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.types import ASGIApp

from sps_runtime.server.auth import Access
from sps_runtime.server.options import Accepts
from sps_runtime.server.service import Call

Handler = Callable[[Call], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class RouteSpec:
    """One route. Access has no default: whoever adds a route decides.

    Attributes:
        accepts: what its body may be; None where it has none.
        summary: what it is for, in the OpenAPI document.
        answers: the media type of an answer that is no stream.
    """

    path: str
    methods: tuple[str, ...]
    access: Access
    handler: Handler
    accepts: Accepts | None = None
    summary: str = ""
    answers: str = "application/json"

"""GET /openapi.json: the table of routes and the types that validate bodies, as OpenAPI 3.1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

import sps_runtime
from sps_runtime.server.anthropic_writer import AnthropicError
from sps_runtime.server.auth import Access
from sps_runtime.server.error_handlers import ErrorAnswer
from sps_runtime.server.options import IGNORED_HEADER
from sps_runtime.server.route import RouteSpec
from sps_runtime.server.service import Call

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_GROUPS = (("/v1/messages", "Anthropic"), ("/v1/", "OpenAI"), ("/", "native"))
_ERRORS = {
    "400": "a value that cannot be served; `param` names it",
    "401": "no known key",
    "403": "a key that does not suffice",
    "404": "no such model, response or request",
    "413": "the body is too large",
    "415": "the body is not plain JSON",
    "500": "this request's own trouble inside the server",
    "503": "too many requests, or the engine is starting, draining or gone; with Retry-After",
}
_WITH_BODY = {"413", "415"}


async def openapi(call: Call) -> ASGIApp:
    """The document of the routes that this server has."""
    return Response(call.request.app.state.openapi(), media_type="application/json")


def encoded(routes: Sequence[RouteSpec]) -> bytes:
    """The document of some routes as JSON."""
    return msgspec.json.format(msgspec.json.encode(document(routes)), indent=1) + b"\n"


def document(routes: Sequence[RouteSpec]) -> dict[str, Any]:
    """The OpenAPI document of some routes."""
    kinds = {route.accepts.kind for route in routes if route.accepts is not None}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(
        [*ordered, ErrorAnswer, AnthropicError], ref_template=_REFERENCE
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in route.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SPS",
            "version": sps_runtime.__version__,
            "description": "A serving runtime for long prompts. Unknown options are accepted and"
            f" named in the response header `{IGNORED_HEADER}`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: RouteSpec, path: str, method: str) -> dict[str, Any]:
    group = next(name for prefix, name in _GROUPS if path.startswith(prefix))
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": route.summary,
        "tags": [group],
        "responses": {"200": _answer(route)} | _errors(route, group),
        "security": [] if route.access is Access.PUBLIC else [{"bearer": []}, {"key": []}],
    }
    names = _PARAMETER.findall(route.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if route.accepts is not None:
        schema = {"$ref": _REFERENCE.format(name=route.accepts.kind.__name__)}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        if route.accepts.unsupported:
            operation["x-sps-refused"] = sorted(route.accepts.unsupported)
    return operation


def _answer(route: RouteSpec) -> dict[str, Any]:
    content: dict[str, Any] = {route.answers: {}}
    answer: dict[str, Any] = {"description": "the answer", "content": content}
    if route.accepts is not None:
        if "stream" in route.accepts.kind.__struct_encode_fields__:
            content["text/event-stream"] = {}
        answer["headers"] = {
            IGNORED_HEADER: {
                "description": "options that were given and are not known",
                "schema": {"type": "string"},
            }
        }
    return answer


def _errors(route: RouteSpec, group: str) -> dict[str, Any]:
    """Errors that a route may answer with, in its API's form."""
    kind = AnthropicError if group == "Anthropic" else ErrorAnswer
    schema = {"$ref": _REFERENCE.format(name=kind.__name__)}
    left_out = set() if route.accepts is not None else _WITH_BODY
    if route.access is Access.PUBLIC:
        left_out = left_out | {"400", "401"}
    if route.access is not Access.ADMIN:
        left_out = left_out | {"403"}
    return {
        status: {"description": why, "content": {"application/json": {"schema": schema}}}
        for status, why in _ERRORS.items()
        if status not in left_out
    }

"""Exceptions to responses: one table, one shape, no text of a foreign exception.

The body is OpenAI's ``{"error": {message, type, param, code}}`` with the same fields beside it at
top level, where SGLang's clients look.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sps_runtime.types.errors import EngineDead, InvalidRequest, SpsError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = "1"
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable",
}
_MESSAGES: Mapping[int, str] = {
    404: "there is no such path",
    405: "this path does not take that method",
}
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class AnswerFailed(SpsError):
    """A request that was accepted and could not be finished."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class ErrorFields(msgspec.Struct, kw_only=True):
    """What went wrong.

    Attributes:
        param: the field as the client wrote it, by its path.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(ErrorFields, kw_only=True):
    """The body of every error, but those of Anthropic's routes."""

    object: Literal["error"] = "error"
    error: ErrorFields


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
    fields = ErrorFields(message=message, type=kind, param=param, code=code)
    body: dict[str, Any] = msgspec.to_builtins(
        ErrorAnswer(message=message, type=kind, param=param, code=code, error=fields)
    )
    return body


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for any exception."""
    if isinstance(error, InvalidRequest):
        body = error_body(error.message, error.status, param=error.field, code=error.code)
        return error.status, body
    if isinstance(error, AnswerFailed):
        return error.status, error_body(error.message, error.status)
    if isinstance(error, EngineDead):
        return 503, error_body(str(error), 503, code="engine_unavailable")
    if isinstance(error, HTTPException):
        message = _MESSAGES.get(error.status_code, "the request cannot be served")
        return error.status_code, error_body(message, error.status_code)
    logger.error("a handler failed", exc_info=error)
    return 500, error_body("internal error", 500)


async def handle_error(request: Request, error: Exception) -> Response:
    """The exception handler of every route."""
    status, body = describe(error)
    headers = request_id_header(request)
    if status == 503:
        headers["retry-after"] = RETRY_AFTER_S
    elif status == 401:
        headers["www-authenticate"] = "Bearer"
    elif status == 408:
        headers["connection"] = "close"
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def request_id_header(request: Request) -> dict[str, str]:
    """The client's own id of a request, given back; nothing is ever decided by it."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return {REQUEST_ID_HEADER: given} if _REQUEST_ID.fullmatch(given) else {}

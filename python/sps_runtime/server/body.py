"""Request bodies: bounded while they come in, checked for depth, decoded into typed structs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from sps_runtime.types.errors import InvalidRequest

T = TypeVar("T")

MAX_JSON_DEPTH = 32
_STRING = re.compile(rb'"[^"]*"')
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$|- at `key` in `\$\.?([^`]*)`$")

_IDS = {"type": "array", "items": {"type": "integer"}}
_ID_LISTS = [_IDS, {"type": "array", "items": _IDS}]
_TEXTS = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
_ID_ROWS = {"type": "array", "items": {"anyOf": [_IDS, {"type": "null"}]}}


def _documented(*forms: object) -> msgspec.Meta:
    """What a value that is decoded by hand may be, for the OpenAPI document."""
    return msgspec.Meta(extra_json_schema={"anyOf": [*forms, {"type": "null"}]})


Prompts = Annotated[msgspec.Raw, _documented(*_TEXTS, *_ID_LISTS)]
"""Text, token ids, or a list of either."""
IdLists = Annotated[msgspec.Raw, _documented(*_ID_LISTS)]
"""Token ids, or a list of such lists."""
WantedIds = Annotated[msgspec.Raw, _documented(_IDS, _ID_ROWS)]
"""Token ids for all prompts, or for each of them."""


def nothing() -> msgspec.Raw:
    """What a field is that was not given."""
    return msgspec.Raw(b"null")


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """Return the whole body.

    Raises:
        InvalidRequest: 413 beyond `limit` bytes (told by the length header where there is one),
            415 for anything but plain JSON, 408 when it does not come in time.
    """
    _check_headers(request, limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise InvalidRequest("the body did not come in time", status=408) from None
    except ClientDisconnect:
        raise InvalidRequest("the client went away", status=400) from None
    return b"".join(chunks)


def _check_headers(request: Request, limit: int) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("compressed bodies are not accepted", status=415)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest("the content type must be application/json", status=415)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"the body is larger than {limit} bytes", status=413, code="body_too_large"
    )


def check_depth(body: bytes) -> None:
    """Raise `InvalidRequest` when JSON nests deeper than `MAX_JSON_DEPTH`.

    Every pass runs at C speed: escapes and strings are dropped, then each round removes the
    innermost pairs of brackets, so that as many rounds are needed as there are levels.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", plain.translate(_ONE_KIND, _NOT_STRUCTURE))
    for _ in range(MAX_JSON_DEPTH):
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    else:
        if brackets:
            raise _too_deep()
    if len(brackets) > 2 * MAX_JSON_DEPTH:  # unbalanced: what is left is no valid JSON anyway
        raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(
        f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels", code="json_too_deep"
    )


def decode(body: bytes | msgspec.Raw, kind: Any, *, field: str = "") -> Any:
    """Decode JSON into `kind`, strictly: no coercion, no NaN, no number beyond its type.

    Args:
        body: the JSON.
        kind: a type that msgspec knows.
        field: where in the request this stands, for errors.

    Raises:
        InvalidRequest: naming the field by its path.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        path = _path_of(text, field)
        reason = _PATH.sub("", text).strip()
        raise InvalidRequest(f"{path}: {reason}" if path else reason, field=path or None) from None
    except msgspec.DecodeError:
        raise InvalidRequest(
            f"{field or 'the body'} is not valid JSON", field=field or None, code="invalid_json"
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise InvalidRequest(
            f"{field or 'the body'} is not valid JSON in UTF-8",
            field=field or None,
            code="invalid_json",
        ) from None


def _path_of(message: str, prefix: str) -> str:
    found = _PATH.search(message)
    path = (found[1] or found[2] or "") if found else ""
    if not prefix or not path:
        return prefix or path
    return prefix + (path if path.startswith("[") else "." + path)


def decode_fields(body: bytes) -> Mapping[str, msgspec.Raw]:
    """Return the top level of a JSON object, its values undecoded; of a repeated key the last."""
    check_depth(body)
    fields: dict[str, msgspec.Raw] = decode(body, dict[str, msgspec.Raw])
    return fields


def is_nothing(raw: msgspec.Raw) -> bool:
    """Whether a value says nothing: null, or empty (clients send both for what they do not use)."""
    return bytes(raw).strip() in (b"null", b"[]", b"{}", b'""', b"false")

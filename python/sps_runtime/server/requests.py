"""A route's body: read within bounds, its options checked, decoded into the route's own type."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sps_runtime.server.body import decode, decode_fields, read_body
from sps_runtime.server.options import check_options
from sps_runtime.server.service import Call

Body = TypeVar("Body", bound=msgspec.Struct)


async def read_request(call: Call, kind: type[Body]) -> tuple[Body, dict[str, str]]:
    """Return the body, and the response headers that name what it holds in vain.

    Args:
        kind: the type that the table of routes names, from which it is documented.

    Raises:
        InvalidRequest: naming the field.
    """
    accepts, service = call.accepts, call.service
    if accepts is None or accepts.kind is not kind:
        raise TypeError(f"the table of routes has another body than {kind.__name__}")
    limit = service.manager.limits.max_body_bytes
    raw = await read_body(call.request, limit, service.timeouts.body)
    headers = check_options(decode_fields(raw), kind, accepts.unsupported)
    body: Body = decode(raw, kind)
    return body, headers

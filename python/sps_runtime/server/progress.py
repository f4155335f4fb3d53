"""GET /v1/progress/{id}: how far a running request is."""

from __future__ import annotations

import re
from typing import Any

from starlette.types import ASGIApp

from sps_runtime.frontend.request_state import RequestState
from sps_runtime.server.admin import as_json
from sps_runtime.server.service import Call
from sps_runtime.types.errors import InvalidRequest

_PREFIX = re.compile(r"^(chatcmpl|cmpl|msg|resp)[-_]")


async def progress(call: Call) -> ASGIApp:
    """One's own request, by the `rid` that it was sent with or by the id that its answer has.

    Raises:
        InvalidRequest: 404 when no such request runs.
    """
    name, identity = call.request.path_params["id"], call.identity
    found: list[RequestState] = []
    for candidate in dict.fromkeys((name, _PREFIX.sub("", name))):
        found = found or call.service.manager.find(
            identity.owner, candidate, any_owner=identity.admin
        )
    if not found:
        raise InvalidRequest("no request of that id is running", status=404, code="not_found")
    return as_json({"id": name, **_summary(found)})


def _summary(states: list[RequestState]) -> dict[str, Any]:
    sequences = [
        {
            "index": state.index,
            "phase": state.phase,
            "prefill_done": state.prefilled,
            "prefill_total": state.prompt_tokens,
            "completion_tokens": state.completion_tokens,
        }
        for state in sorted(states, key=lambda state: state.index)
    ]
    return {
        "prefill_done": sum(state.prefilled for state in states),
        "prefill_total": sum(state.prompt_tokens for state in states),
        "sequences": sequences,
    }

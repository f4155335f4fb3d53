"""Probes and metrics: is it alive, is it ready, does it answer?"""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.server.error_handlers import RETRY_AFTER_S
from sps_runtime.server.service import Call
from sps_runtime.telemetry.metrics import CONTENT_TYPE
from sps_runtime.types.errors import InvalidRequest


def _state(state: str, *, good: bool) -> Response:
    headers = {} if good else {"retry-after": RETRY_AFTER_S}
    content = msgspec.json.encode({"status": state})
    return Response(content, 200 if good else 503, headers, "application/json")


async def livez(call: Call) -> ASGIApp:
    """The event loop turns; says nothing about the engine."""
    return _state("alive", good=True)


async def readyz(call: Call) -> ASGIApp:
    """New requests are taken."""
    health = call.service.manager.health
    return _state(health.state, good=health.serving)


async def health(call: Call) -> ASGIApp:
    """The engine lives, by its heartbeat; nothing is sent to it."""
    state = call.service.manager.health.state
    return _state(state, good=state in ("ready", "draining"))


async def health_generate(call: Call) -> ASGIApp:
    """The engine makes tokens."""
    healthy = await call.service.probe.healthy()
    state = call.service.manager.health.state
    return _state(state if not healthy else "ready", good=healthy)


async def metrics(call: Call) -> ASGIApp:
    """Prometheus metrics."""
    service = call.service
    if not service.server.enable_metrics:
        raise InvalidRequest(
            "metrics are off: start the server with --enable-metrics",
            status=404,
            code="metrics_disabled",
        )
    text = service.metrics.exposition(await service.manager.fresh_state())
    return Response(text, 200, media_type=CONTENT_TYPE)

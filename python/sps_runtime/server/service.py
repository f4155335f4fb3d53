"""What every handler has at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import Request

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.frontend.parsing.reasoning import ReasoningFormat, find_reasoning_format
from sps_runtime.frontend.parsing.tool_formats import ToolFormat, find_tool_format
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.server.auth import Identity
from sps_runtime.server.generation_probe import GenerationProbe
from sps_runtime.server.metrics import Metrics
from sps_runtime.server.options import Accepts
from sps_runtime.server.responses_store import ResponseStore
from sps_runtime.types.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds that HTTP waits for something.

    Attributes:
        body: until a request's body is complete.
        ping: silence in a stream before a comment is sent.
        stall: how long one write may wait for a client that does not read.
        probe: how long /health_generate waits for its token.
    """

    body: float = 60.0
    ping: float = 15.0
    stall: float = 30.0
    probe: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """The server's parts.

    Attributes:
        manager: the way into the engine.
        server, engine: settings.
        metrics: what /metrics shows.
        probe: behind /health_generate.
        started: unix time of the start.
        responses: former responses of /v1/responses.
    """

    manager: TokenizerManager
    server: ServerConfig
    engine: EngineConfig
    metrics: Metrics
    probe: GenerationProbe
    timeouts: Timeouts = Timeouts()
    started: int = field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = field(default_factory=ResponseStore)

    @property
    def model_name(self) -> str:
        return self.server.served_model_name or self.engine.model_path

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls. Raises ConfigError for a name that nobody knows."""
        template = self.manager.tokenizer.chat_template
        source = template.source if template is not None else ""
        return find_tool_format(self.server.tool_call_parser, source)

    @cached_property
    def reasoning_format(self) -> ReasoningFormat | None:
        """How the model writes reasoning. Raises ConfigError for a name that nobody knows."""
        return find_reasoning_format(self.server.reasoning_parser)

    def check_model(self, name: str | None) -> None:
        """Raise a 404 unless `name` is the served model's (or absent, or "default")."""
        if name not in (None, "default", self.model_name, self.engine.model_path):
            raise InvalidRequest(
                "model: no model of that name is served; GET /v1/models names it",
                field="model",
                status=404,
                code="model_not_found",
            )


@dataclass(frozen=True)
class Call:
    """One HTTP request on its way through a handler.

    Attributes:
        accepts: what the route's body may be; None for a route without a body.
    """

    request: Request
    service: Service
    identity: Identity
    accepts: Accepts | None = None

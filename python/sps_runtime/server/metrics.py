"""What /metrics shows: the front end's own figures and the engine's newest state."""

from __future__ import annotations

import asyncio
import logging
import time

from prometheus_client import CollectorRegistry, Gauge, Histogram

from sps_runtime.frontend.observer import RequestSummary
from sps_runtime.telemetry.metrics import EngineMetrics, RequestMetrics, render
from sps_runtime.types.messages import EngineState

logger = logging.getLogger("sps_runtime.requests")

LAG_INTERVAL_S = 0.25
LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """A `frontend.observer.RequestObserver` over a registry of its own.

    Args:
        model_name: the label of everything.
        log_requests: log one line per finished request, never its text.
    """

    def __init__(self, model_name: str, *, log_requests: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._requests = RequestMetrics(model_name, self._registry)
        self._engine = EngineMetrics(model_name, self._registry)
        self._log = log_requests
        self._known: EngineState | None = None
        self._lag = Gauge(
            "sps:event_loop_lag_seconds",
            "how late the event loop was lately, at worst",
            ("model_name",),
            registry=self._registry,
        ).labels(model_name)
        self._lags = Histogram(
            "sps:event_loop_delay_seconds",
            "how late timers of the event loop were",
            ("model_name",),
            buckets=LAG_BUCKETS_S,
            registry=self._registry,
        ).labels(model_name)
        self._worst_lag_s = 0.0

    def accepted(self, prompt_tokens: int) -> None:
        self._requests.accepted(prompt_tokens)

    def rejected(self, reason: str) -> None:
        self._requests.rejected(reason)

    def first_token(self, seconds: float) -> None:
        self._requests.first_token(seconds)

    def more_tokens(self, count: int, seconds: float) -> None:
        self._requests.more_tokens(count, seconds)

    def late_message(self) -> None:
        self._requests.late_message()

    def finished(self, summary: RequestSummary) -> None:
        self._requests.finished(
            summary.reason,
            cached_tokens=summary.cached_tokens,
            completion_tokens=summary.completion_tokens,
            first_token_s=summary.first_token_s,
            total_s=summary.total_s,
            attention=summary.attention,
        )
        if self._log:
            logger.info(
                "request %s: %s, %d prompt tokens (%d cached), %d generated, %.3f s",
                summary.rid,
                summary.reason,
                summary.prompt_tokens,
                summary.cached_tokens,
                summary.completion_tokens,
                summary.total_s,
            )

    def exposition(self, state: EngineState) -> bytes:
        """The text that Prometheus reads."""
        if state is not self._known:
            self._engine.update(state, time.monotonic())
            self._known = state
        self._requests.settle()
        self._lag.set(self._worst_lag_s)
        self._worst_lag_s = 0.0
        return render(self._registry)

    async def watch_loop(self) -> None:
        """Measure for ever how late timers of this loop are."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL_S)
            lag_s = time.monotonic() - started - LAG_INTERVAL_S
            self._worst_lag_s = max(self._worst_lag_s, lag_s)
            self._lags.observe(max(lag_s, 0.0))

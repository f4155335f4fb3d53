"""Prometheus metrics: SGLang's names, so that its dashboards work, and ours for what it has not.

Label values are bounded: a model's name, a rank, a fixed word; never a request's id, key or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sps_runtime.telemetry.sparse_metrics import SparseMetrics
from sps_runtime.types.attention import AttentionReport
from sps_runtime.types.messages import EngineState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
_TOTAL_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_MOST_GAPS = 256
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


class RequestMetrics:
    """What the front end sees of requests. Methods are called on its event loop and return at once.

    Args:
        model_name: the value of the label ``model_name``.
        registry: where the metrics are registered.
    """

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._model = model_name
        self._requests = self._counter("sglang:num_requests", "requests accepted")
        self._aborted = self._counter("sglang:num_aborted_requests", "requests ended by an abort")
        self._prompt = self._counter("sglang:prompt_tokens", "prompt tokens of accepted requests")
        self._generated = self._counter("sglang:generation_tokens", "tokens generated")
        self._cached = self._counter("sglang:cached_tokens", "prompt tokens found in the cache")
        self._late = self._counter("sps:late_message", "news of requests that had ended")
        self._rejected = Counter(
            "sps:admission_rejected",
            "requests refused",
            ("model_name", "reason"),
            registry=registry,
        )
        self._finished = Counter(
            "sps:requests_finished", "requests ended", ("model_name", "reason"), registry=registry
        )
        self._first = self._histogram(
            "sglang:time_to_first_token_seconds", "arrival to first token", _FIRST_TOKEN_S
        )
        self._total = self._histogram(
            "sglang:e2e_request_latency_seconds", "arrival to end", _TOTAL_S
        )
        self._between = self._histogram(
            "sglang:inter_token_latency_seconds", "one token to the next", _TOKEN_S
        )
        self._per_token = self._histogram(
            "sglang:time_per_output_token_seconds", "mean per token after the first", _TOKEN_S
        )

        self._sparse = SparseMetrics(model_name, registry)
        self._gaps: list[tuple[int, float]] = []

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(name, about, ("model_name",), registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            name, about, ("model_name",), buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model)

    def accepted(self, prompt_tokens: int) -> None:
        self._requests.inc()
        self._prompt.inc(prompt_tokens)

    def rejected(self, reason: str) -> None:
        """`reason` is one of a few fixed words."""
        self._rejected.labels(self._model, reason).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)
        self._generated.inc()

    def more_tokens(self, count: int, seconds: float) -> None:
        """`count` tokens came `seconds` after the ones before; each took its share."""
        self._gaps.append((count, seconds))
        if len(self._gaps) >= _MOST_GAPS:
            self.settle()

    def settle(self) -> None:
        """Count what was only noted: at once that costs less than token by token."""
        gaps, self._gaps = self._gaps, []
        self._generated.inc(sum(count for count, _ in gaps))
        for count, seconds in gaps:
            for _ in range(count):
                self._between.observe(seconds / count)

    def finished(
        self,
        reason: str,
        *,
        cached_tokens: int,
        completion_tokens: int,
        first_token_s: float | None,
        total_s: float,
        attention: AttentionReport | None = None,
    ) -> None:
        """A request ended: ``stop``, ``length``, ``abort`` or ``error``."""
        self.settle()
        self._finished.labels(self._model, reason).inc()
        if reason == "abort":
            self._aborted.inc()
        self._cached.inc(cached_tokens)
        self._total.observe(total_s)
        if first_token_s is not None and completion_tokens > 1:
            self._per_token.observe((total_s - first_token_s) / (completion_tokens - 1))
        if attention is not None:
            self._sparse.finished(attention)

    def late_message(self) -> None:
        self._late.inc()


class EngineMetrics(Collector):
    """The newest `EngineState` as metrics; gauges are exactly what the scheduler last said."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model = model_name
        self._state = EngineState()
        self._rates = (0.0, 0.0)
        self._updated: float | None = None
        registry.register(self)

    def update(self, state: EngineState, now: float) -> None:
        """Take a new state; `now` in seconds of a monotonic clock, to know rates by."""
        before = self._state
        if self._updated is not None and now > self._updated:
            tokens = state.generated_tokens_total - before.generated_tokens_total
            prompt = state.prompt_tokens_total - before.prompt_tokens_total
            cached = state.cached_tokens_total - before.cached_tokens_total
            hit_rate = cached / prompt if prompt > 0 else self._rates[1]
            self._rates = (tokens / (now - self._updated), hit_rate)
        self._state, self._updated = state, now

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield self._pages()

    def _gauges(self) -> Iterator[Metric]:
        state = self._state
        usage = state.used_tokens / state.max_total_tokens if state.max_total_tokens else 0.0
        values = (
            ("sglang:num_running_reqs", "requests that hold KV", state.running),
            ("sglang:num_queue_reqs", "requests that wait", state.waiting),
            ("sglang:num_used_tokens", "tokens of KV in use", state.used_tokens),
            ("sglang:token_usage", "share of the KV in use", usage),
            ("sglang:max_total_num_tokens", "tokens of KV there are", state.max_total_tokens),
            ("sglang:gen_throughput", "tokens generated per second", self._rates[0]),
            ("sglang:cache_hit_rate", "share of prompt tokens found cached", self._rates[1]),
            ("sps:step_age_seconds", "age of the oldest unanswered plan", state.step_age_s),
        )
        for name, about, value in values:
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], float(value))
            yield family

    def _counters(self) -> Iterator[Metric]:
        state = self._state
        values = (
            ("sglang:num_retracted_requests", "requests put back", state.retractions_total),
            ("sps:prefix_waits", "requests kept for a prefix", state.prefix_waits_total),
            ("sps:steps", "plans executed", state.steps_total),
            ("sps:attention_bytes", "attention, by non-owners", state.sent_bytes_total),
            ("sps:physical_bytes", "attention, really copied", state.physical_bytes_total),
            ("sps:linear_bytes", "traffic of linear layers", state.linear_bytes_total),
            ("sps:exposed_seconds", "ranks waiting, nothing to do", state.exposed_seconds_total),
            ("sps:compute_seconds", "ranks computing", state.compute_seconds_total),
        )
        for name, about, value in values:
            family = CounterMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], float(value))
            yield family

    def _pages(self) -> Metric:
        labels = ["model_name", "rank", "state"]
        family = GaugeMetricFamily("sps:pool_pages", "pages of each SP rank", labels=labels)
        for rank, pages in enumerate(self._state.ranks):
            parts = (
                ("free", pages.free_pages),
                ("cached", pages.cached_pages),
                ("used", pages.used_pages),
            )
            for name, count in parts:
                family.add_metric([self._model, str(rank), name], count)
        return family


def render(registry: CollectorRegistry) -> bytes:
    """The exposition text, of `CONTENT_TYPE`."""
    return generate_latest(registry)

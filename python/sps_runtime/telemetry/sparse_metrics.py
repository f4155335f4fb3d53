"""Prometheus metrics of requests that asked for sparse attention."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from sps_runtime.types.attention import AttentionReport

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class SparseMetrics:
    """Counts finished requests by their `AttentionReport`.

    Args:
        model_name: the value of the label ``model_name``.
        registry: where the metrics are registered.
    """

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        labels = ("model_name",)
        self._model = model_name
        self._requests = Counter(
            "sps:csa_requests",
            "requests that asked for csa, by what ran",
            ("model_name", "ran"),
            registry=registry,
        )
        self._bytes = Counter(
            "sps:csa_remote_bytes", "logical bytes read from other ranks", labels, registry=registry
        ).labels(model_name)
        self._fallbacks = Counter(
            "sps:csa_fallbacks",
            "(layer, superblock, KV head) made exact by max_tau",
            labels,
            registry=registry,
        ).labels(model_name)
        self._density = Histogram(
            "sps:csa_density",
            "pages read over causal pages, of a prompt",
            labels,
            buckets=_SHARES,
            registry=registry,
        ).labels(model_name)
        self._tau = Histogram(
            "sps:csa_tau",
            "mean measured dropped mass of a prompt, where it was audited",
            labels,
            buckets=_SHARES,
            registry=registry,
        ).labels(model_name)

    def finished(self, report: AttentionReport) -> None:
        """A request ended."""
        self._requests.labels(self._model, report.mode).inc()
        if report.mode == "exact":
            return
        self._density.observe(report.density)
        self._bytes.inc(report.remote_bytes)
        self._fallbacks.inc(report.fallbacks)
        if report.tau_mean is not None:
            self._tau.observe(report.tau_mean)

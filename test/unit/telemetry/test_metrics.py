"""Metrics say what the engine said, under the names that dashboards know."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from sps_runtime.telemetry.metrics import EngineMetrics, RequestMetrics, render
from sps_runtime.types.messages import EngineState, RankState


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name, rank, state or reason) -> value, through the text format and back."""
    found = {}
    for family in text_string_to_metric_families(render(registry).decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            assert sample.labels["model_name"] == "m"
            found[(sample.name, *labels.values())] = sample.value
    return found


def test_engine_state_is_shown_as_it_is() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics("m", registry)
    metrics.update(EngineState(generated_tokens_total=10), now=1.0)
    state = EngineState(
        running=3,
        waiting=2,
        max_total_tokens=1000,
        used_tokens=250,
        ranks=(RankState(5, 3, 2, 10), RankState(10, 0, 0, 10)),
        generated_tokens_total=110,
        prompt_tokens_total=200,
        cached_tokens_total=50,
        sent_bytes_total=7,
        prefix_waits_total=4,
    )
    metrics.update(state, now=3.0)
    got = samples(registry)
    assert got[("sglang:num_running_reqs",)] == 3
    assert got[("sglang:token_usage",)] == 0.25
    assert got[("sglang:gen_throughput",)] == 50.0
    assert got[("sglang:cache_hit_rate",)] == 0.25
    assert got[("sps:attention_bytes_total",)] == 7
    assert got[("sps:prefix_waits_total",)] == 4
    assert got[("sps:pool_pages", "0", "cached")] == 3
    assert got[("sps:pool_pages", "1", "free")] == 10


def test_requests_are_counted_once_each() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics("m", registry)
    metrics.accepted(prompt_tokens=100)
    metrics.first_token(0.5)
    metrics.more_tokens(4, 0.4)
    metrics.finished("stop", cached_tokens=64, completion_tokens=5, first_token_s=0.5, total_s=0.9)
    metrics.rejected("queue_full")
    got = samples(registry)
    assert got[("sglang:num_requests_total",)] == 1
    assert got[("sglang:prompt_tokens_total",)] == 100
    assert got[("sglang:generation_tokens_total",)] == 5
    assert got[("sglang:cached_tokens_total",)] == 64
    assert got[("sglang:time_to_first_token_seconds_count",)] == 1
    assert got[("sglang:inter_token_latency_seconds_count",)] == 4
    assert abs(got[("sglang:time_per_output_token_seconds_sum",)] - 0.1) < 1e-9
    assert got[("sps:admission_rejected_total", "queue_full")] == 1
    assert got[("sps:requests_finished_total", "stop")] == 1
    assert ("sglang:num_aborted_requests_total",) in got

"""Choices that a user left open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test.kit.echo_engine import CONFIG

from sps_runtime.config.model import parse_model_config
from sps_runtime.config.options import EngineOptions
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.launch import sizing
from sps_runtime.types.errors import ConfigError

MODEL = parse_model_config({**CONFIG, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"})


def settle(**options: object) -> object:
    return sizing.settle(EngineOptions(**options), MODEL, Path("/m"))  # type: ignore[arg-type]


def test_max_total_tokens_is_spread_over_ranks_and_never_cut() -> None:
    config = sizing.settle(
        EngineOptions(max_total_tokens=1000, page_size=16, parallel=ParallelConfig(sp_size=3)),
        MODEL,
        Path("/m"),
    )
    assert config.cache.pages_per_rank == 21
    assert config.max_total_tokens >= 1000
    assert config.dtype == "bfloat16" and config.context_length == 4096


def test_a_share_of_free_memory_becomes_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    per_token = 2 * 2 * 2 * 16 * 2  # K and V, layers, KV heads, head_dim, bytes
    assert sizing.kv_bytes_per_token(MODEL, 1, "bfloat16") == per_token
    monkeypatch.setattr(sizing, "available_memory", lambda: per_token * 64 * 100)
    options = EngineOptions(mem_fraction_static=0.25, parallel=ParallelConfig(sp_size=5))
    assert sizing.settle(options, MODEL, Path("/m")).cache.pages_per_rank == 5
    monkeypatch.setattr(sizing, "available_memory", lambda: per_token)
    with pytest.raises(ConfigError, match="hold no page"):
        sizing.settle(options, MODEL, Path("/m"))


def test_quantised_pages_are_smaller_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 1 << 24)
    pages = {}
    for wanted in ("auto", "bf16", "int8", "fp8_e4m3"):
        options = EngineOptions(mem_fraction_static=0.5, kv_cache_dtype=wanted)
        pages[wanted] = sizing.settle(options, MODEL, Path("/m")).cache
    assert pages["auto"] == pages["bf16"] and pages["auto"].kv_dtype == "bfloat16"
    rows = {name: 2 * 2 * 2 * row * 64 for name, row in (("int8", 20), ("fp8_e4m3", 16))}
    for name, page_bytes in rows.items():
        assert pages[name].kv_dtype == name
        assert pages[name].pages_per_rank == (1 << 23) // page_bytes
    with pytest.raises(ConfigError, match="does not go with"):
        sizing.settle(EngineOptions(kv_cache_dtype="float32"), MODEL, Path("/m"))


def test_unless_told_the_pool_is_capped() -> None:
    config = sizing.settle(EngineOptions(), MODEL, Path("/m"))
    assert config.max_total_tokens <= sizing.DEFAULT_TOKENS_CAP


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "expected"),
    [
        ({0, 1, 2, 3}, 2, 2, ((0, 1), (2, 3))),
        ({4, 7}, 2, 1, ((4,), (7,))),
        ({0, 1}, 3, 1, ()),
        ({0, 1, 2, 3, 4}, 2, 2, ((0, 1), (2, 3))),
    ],
)
def test_ranks_get_cores_of_their_own_or_none(
    monkeypatch: pytest.MonkeyPatch,
    cores: set[int],
    ranks: int,
    threads: int,
    expected: tuple[tuple[int, ...], ...],
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr(sizing, "claimed_cpus", frozenset)  # whatever else runs on this machine
    options = EngineOptions(max_total_tokens=64, parallel=ParallelConfig(sp_size=ranks))
    config = sizing.settle(options, MODEL, Path("/m"))
    assert config.cores == expected
    assert config.threads_per_rank == threads


def test_available_memory_is_plausible() -> None:
    assert 16 << 20 < sizing.available_memory() < 1 << 50

"""The variables that child processes start with."""

from __future__ import annotations

import os

import pytest

from sps_runtime.config.environment import ALLOCATOR, rank_environment, service_environment


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "OMP_", "TOKENIZERS_")) or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)


def test_a_rank_has_its_threads_and_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    environment = rank_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3" and environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment.items() >= ALLOCATOR.items() and environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_user_who_set_the_allocator_has_it_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    assert not ALLOCATOR.keys() & rank_environment(1).keys()


def test_services_have_no_pools_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service_environment()["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert service_environment()["TOKENIZERS_PARALLELISM"] == "true"

"""What `sps doctor` says of cores and of the allocator."""

from __future__ import annotations

import os

import pytest

from sps_runtime.launch import doctor, topology


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "cpu_quota", lambda: None)
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)


def test_bindings_of_one_and_two_ranks_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1000, 1001, 1002})
    one, two, allocator = doctor._threads()
    assert one.verdict == "ok" and one.found == "3 threads each on 1000-1002"
    assert two.found == "1 threads each on 1000 | 1001, others on 1002"
    assert allocator.verdict == "ok"


def test_ranks_that_outnumber_cores_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1000})
    _, two, _ = doctor._threads()
    assert two.verdict == "note" and "outnumber 1 cores" in two.cost


def test_allocator_settings_of_the_users_own_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert "MALLOC_ARENA_MAX" in doctor._threads()[-1].found

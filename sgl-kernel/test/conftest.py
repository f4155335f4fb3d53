"""Fixtures: every test that asks for `isa` runs once per instruction set of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sps_kernel

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=sps_kernel.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Switches the instruction set for one test."""
    best = sps_kernel.current_isa()
    sps_kernel.set_isa(request.param)
    yield request.param
    sps_kernel.set_isa(best)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh inputs in every run; SPS_TEST_SEED repeats a run. Printed when a test fails."""
    value = int(os.environ.get("SPS_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"SPS_TEST_SEED={value}")
    torch.manual_seed(value)
    return value

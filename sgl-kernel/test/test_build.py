"""Feature report and dispatch."""

from __future__ import annotations

from pathlib import Path

import pytest

import sps_kernel


def test_features_agree_with_the_kernel():
    flags = next(
        (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), ""
    ).split()
    if not flags:
        pytest.skip("no x86 flags here")
    for name, present in sps_kernel.cpu_features().items():
        assert present == (name in flags), name


def test_best_isa_is_the_default():
    isas = sps_kernel.available_isas()
    assert isas[0] == "generic" and sps_kernel.current_isa() == isas[-1]
    info = sps_kernel.build_info()
    assert info["isas"] == isas and info["isa"] == isas[-1] and info["compiler"]


def test_everything_public_is_documented():
    for name in sps_kernel.__all__:
        item = getattr(sps_kernel, name)
        assert isinstance(item, tuple) or item.__doc__ or name == "KVPools"


def test_a_sanitized_build_says_so():
    """Guards sanitize.sh against testing an ordinary build by mistake."""
    import os

    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        assert sps_kernel.build_info()["sanitized"]

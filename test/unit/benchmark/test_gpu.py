"""The GPU benchmark's own parts, on a CPU: all sections run, and one that fails stops no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu
from gpu_kernels import SMALL, Case
from gpu_timing import Budget, Ceilings

CPU = torch.device("cpu")


@pytest.mark.timeout(300)
def test_every_section_runs(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    report = gpu.Report(tmp_path / "found.json", gpu.describe(CPU))
    with torch.inference_mode():
        gpu.run_sections(report, gpu.make_sections(CPU, Ceilings(1e9, 1e9), True), 300.0)
    found = json.loads(report.path.read_text())
    assert [name for name, noted in found["raw"].items() if "error" in noted] == []
    for name in (
        "rms_norm_us_64",
        "decode_ms_graphs_1x256",
        "decode_ahead_ms_graphs_3x128",
        "relay_plain_us_4x256+64",
        "ttft_s_exact_2048",
        "ttft_ratio_exact_over_csa_10_2048",
        "density_csa_10_2048",
        "layer_linear_us_1",
        "prefill_sdpa_ms_512",
    ):
        assert found["figures"][name] > 0
    assert found["figures"]["density_csa_10_2048"] < 1


def test_one_that_fails_is_noted(tmp_path: Path) -> None:
    def fails(budget: Budget) -> Iterator[tuple[str, float]]:
        yield "before", 1.0
        raise RuntimeError("out of memory")

    def works(budget: Budget) -> Iterator[tuple[str, float]]:
        assert not budget.over
        yield "after", 2.0

    report = gpu.Report(tmp_path / "found.json", {})
    sections = [gpu.Section("a", 1, fails), gpu.Section("b", 1, works)]
    gpu.run_sections(report, sections, 10.0)
    found = json.loads(report.path.read_text())
    assert found["figures"] == {"before": 1.0, "after": 2.0}
    assert found["raw"]["a"]["error"] == "RuntimeError: out of memory"
    assert "error" not in found["raw"]["b"]


def test_lists_hold_what_they_say() -> None:
    case = Case(SMALL, 512, 512, CPU)
    lists, share = case.lists(0.25, 128)
    assert len(lists.items) == 4 * SMALL.kv and lists.complete
    own = lists.items[:, 4] - torch.clamp(lists.items[:, 2] // SMALL.page // 4, min=1)
    assert (own[lists.items[:, 2] > 0] == 2).all() and 0.25 < share < 0.7
    dense = 512 * 513 / 2 * 4 * SMALL.q * SMALL.dim
    assert case.flops() == dense

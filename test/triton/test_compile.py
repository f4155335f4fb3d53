"""Every Triton kernel compiles for sm_80 and sm_90, within their shared memory, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What a program may use of a processor's shared memory (CUDA C++ Programming Guide)."""
KERNELS = {
    "attention_kernel", "common_kernel", "keep_kernel", "list_kernel", "mass_kernel",
    "merge_kernel", "merge_splits_kernel", "pack_kernel", "page_kernel", "rms_norm_kernel",
    "rope_kernel", "share_kernel", "silu_mul_kernel", "summary_kernel", "tail_kernel",
    "total_kernel", "unit_kernel", "write_kernel",
}  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cached = os.environ.get("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "test.triton.compile_all", str(capability)],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TRITON_CACHE_DIR": cached,
        },
        capture_output=True,
        text=True,
        timeout=890,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in compiled} == KERNELS
    for one in compiled:
        assert one["shared"] <= SHARED_BYTES[capability], one
        assert 0 < one["registers"] <= 255, one

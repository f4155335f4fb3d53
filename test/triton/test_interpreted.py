"""The Triton kernels' tests, in a process of their own where Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = "test/triton/interpreted"


@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.7")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=600", HERE]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=890,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_package_imports_no_triton() -> None:
    """Neither the package nor what chooses brings it along."""
    code = (
        "import sys, sps_runtime.ops.dispatch as ops, sps_runtime.sparse.dispatch\n"
        "import sps_runtime.attention.choose\n"
        "ops.choose_ops('torch'); ops.choose_ops('auto')\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)

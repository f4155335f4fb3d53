"""The Triton kernels' tests, which run under the interpreter elsewhere, on tensors of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_interpreted_tests_on_the_device() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "test.gpu.on_device"]
    command += ["-p", "no:cacheprovider", "test/triton/interpreted"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

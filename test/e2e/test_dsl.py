"""SGLang's own front end against our server: the real programs, the embedded model, two ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test.kit.echo_http import EchoHttp

PROGRAMS = Path(__file__).parents[1] / "clients" / "dsl_programs.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="the extra [dsl] is not installed"
)


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    with EchoHttp(Path("embedded"), "--sp-size", "2", device="cpu") as running:
        running.wait_ready(60.0)
        yield running


def test_programs_run_unmodified(server: EchoHttp) -> None:
    command = [sys.executable, str(PROGRAMS), server.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith("all 9")

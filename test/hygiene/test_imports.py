"""What importing a package costs and brings along."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from test.hygiene.lint import PACKAGE

TORCH_FREE = (
    "types",
    "config",
    "ipc",
    "telemetry",
    "costmodel",
    "kvcache",
    "scheduler",
    "frontend",
    "server",
    "lang",
)
LAUNCH_SERVER_S = 0.5


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def modules_of(package: str) -> list[str]:
    files = sorted((PACKAGE / package).rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("package", TORCH_FREE)
def test_torch_never_comes_along(package: str) -> None:
    modules = modules_of(package)
    if not modules:
        pytest.skip(f"{package} does not exist yet")
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
    assert run(code + "print(*{m.split('.')[0] for m in sys.modules} & {'torch'})") == ""


def test_the_launcher_imports_fast_and_without_torch() -> None:
    """In seconds of CPU: what else runs on this machine is no fault of ours."""

    def seconds(module: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(f"import {module}, sys; assert 'torch' not in sys.modules")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = min(seconds("json") for _ in range(3))
    ours = min(seconds("sps_runtime.launch_server") for _ in range(4))
    assert ours - bare < LAUNCH_SERVER_S, f"{ours:.2f} s with {bare:.2f} s of bare Python"

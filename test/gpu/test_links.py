"""Two ranks on one GPU, each a process: messages, pools read in place, fences of events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sps_runtime.distributed.regions import create_region

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("kind", ["ipc", "host"])
def test_two_ranks(kind: str) -> None:
    regions = [create_region(name) for name in ("links", "fences", "counters")]
    paths = [str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "test.gpu.rank_program", kind, str(rank), *map(str, regions)],
            cwd=ROOT, env=environment, pass_fds=regions, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    for region in regions:
        os.close(region)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)

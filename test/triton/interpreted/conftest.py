"""Collected only where ``TRITON_INTERPRET=1`` was set before Python began: `test_interpreted.py`
starts such a process. triton looks at it when kernels, its own included, are decorated."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") == "1":
    from test.triton.interpreter import mend

    mend()
elif torch.get_default_device().type != "cuda":  # test/gpu runs them on a device
    collect_ignore_glob.append("*.py")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(7)
    yield

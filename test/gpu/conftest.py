"""What only a GPU can confirm; skipped where torch sees none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder need a GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"no GPU: torch {torch.__version__} sees none")
    for item in items:
        if "/test/gpu/" in str(item.path):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The first GPU, current."""
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)

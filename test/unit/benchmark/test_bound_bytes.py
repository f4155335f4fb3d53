"""What a bound costs in bytes, on a prompt of four superblocks."""

from __future__ import annotations

import msgspec
import pytest
import torch

import bound_bytes
from sps_runtime.types.attention import SparseSettings

TOKENS = 4096


def test_a_bound_costs_audits_or_all_pages() -> None:
    generator = torch.Generator().manual_seed(3)
    shape = bound_bytes.shape_of("embedded")
    layer = tuple(
        torch.randn(TOKENS, heads, shape.head_dim, generator=generator).bfloat16()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    settings = SparseSettings(minimum=4)
    free, held, exceeded, hopeless = (
        bound_bytes.row(
            "random", TOKENS, 2, max_tau,
            bound_bytes.prefill([layer], 2, msgspec.structs.replace(settings, max_tau=max_tau)),
        )
        for max_tau in (1.0, 0.99, 0.1, 0.04)
    )  # fmt: skip
    assert held["pages"] == free["pages"] < 0.5 * free["all_pages"]
    assert exceeded["pages"] == hopeless["pages"] == free["all_pages"]
    # 64 rows of two superblocks, whose pages before them lie with one other rank
    audits = 2 * 64 * shape.heads * (2 * shape.head_dim + 4) / TOKENS
    assert held["rest"] - hopeless["rest"] == pytest.approx(audits, rel=0.01)
    assert exceeded["rest"] == held["rest"]

"""Shares of the memory floor: the bytes of each form of weights."""

from __future__ import annotations

import pytest

from decode_share import figures_of, needed_bytes
from peers.maths import HIDDEN, LINEAR, VOCABULARY, step_bytes


def test_bytes_of_a_step_by_form() -> None:
    head, kv = VOCABULARY * HIDDEN, step_bytes(8, 512) - step_bytes(8, 0)
    assert needed_bytes("bf16", 8, 512) == step_bytes(8, 512)
    assert needed_bytes("int8", 8, 512) == pytest.approx(kv + (LINEAR + head) * 8.25 / 8)
    assert needed_bytes("int4", 8, 512) == pytest.approx(kv + (LINEAR * 4.25 + head * 8.25) / 8)


def test_rounds_whose_probes_disagree_are_told_apart() -> None:
    rows = [
        {"cell": "b1_512", "tokens_per_s": 40.0, "floor": (36e9, 37e9), "share": 0.8},
        {"cell": "b1_512", "tokens_per_s": 60.0, "floor": (36e9, 64e9), "share": 0.5},
    ]
    figures = figures_of(rows)
    assert (figures["rounds_b1_512"], figures["rounds_steady_b1_512"]) == (2, 1)
    assert figures["share_q50_steady_b1_512"] == 0.8

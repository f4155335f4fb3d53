"""Bytes of every way of crossing ranks, counted on ranks that are threads, against formulas."""

from __future__ import annotations

import pytest
import torch

import communication
from sps_runtime.types.attention import SparseSettings


@pytest.mark.parametrize("name", ["gqa8", "embedded"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_strategy_sends_what_its_formula_says(name: str, ranks: int) -> None:
    rows = list(communication.exact_rows(name, 1024, ranks))
    measured = [row for row in rows if "skipped" not in row]
    assert [row["error"] for row in measured] == [0.0] * len(measured)
    left_out = {row["strategy"] for row in rows if "skipped" in row}
    few_heads = name == "embedded" and ranks == 8
    assert left_out == ({"ulysses", "tp", "stride"} if few_heads else set())


@pytest.mark.parametrize("ranks", [2, 4])
def test_block_csa_sends_chosen_pages_summaries_and_audits(ranks: int) -> None:
    blocks = 4 * ranks * SparseSettings().superblock // 64
    generator = torch.Generator().manual_seed(ranks)
    sets = torch.rand(1, 2, blocks, blocks, generator=generator) < 0.02
    sets |= torch.eye(blocks, dtype=torch.bool)
    sets &= torch.ones(blocks, blocks).tril().bool()
    for row in communication.block_rows("embedded", "random", sets, ranks):
        assert 0 <= row["audits"] < 0.05 * row["formula"]
        assert row["density"] == pytest.approx(float(sets.sum()) / (blocks * (blocks + 1)))
        fetched = _fetched(sets[0], ranks, row["placement"])
        assert row["union_share"] == pytest.approx(fetched)


def _fetched(sets: torch.Tensor, ranks: int, placement: str) -> float:
    """u, from the sets alone."""
    per, blocks = 16, sets.shape[1]
    order = list(range(ranks))
    if placement == "zigzag":
        unit = [r for r in order for _ in range(2)] + [r for r in order[::-1] for _ in range(2)]
    else:
        unit = [r for r in order for _ in range(blocks // per // ranks)]
    owner = torch.tensor(unit).repeat_interleave(per)
    fetched = remote = 0
    for rank in order:
        mine = (owner == rank).nonzero()[:, 0]
        others = (owner != rank) & (torch.arange(blocks) < mine.max())
        fetched += int(sets[:, mine].any(1)[:, others].sum())
        remote += 2 * int(others.sum())
    return fetched / remote

"""The accuracy benchmark's own parts: what it chooses is what the reference chooses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import accuracy
from accuracy_cases import Cases
from accuracy_choose import LayerPages, SuperblockQueries, choose
from accuracy_figures import by_cell, counting, worst
from accuracy_model import mean_tail
from accuracy_setups import setup
from sps_runtime.sparse import reference
from sps_runtime.sparse.estimators.bounds import ExactMass, MinMax
from sps_runtime.sparse.estimators.moments import MeanKey
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.summaries import summarise
from sps_runtime.sparse.tail import tail_partial

HEADS, GROUP, DIM, PAGES = 2, 2, 16, 24


def filled(name: str) -> tuple[LayerPages, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    pages = LayerPages.empty(PAGES, HEADS, DIM)
    k, v = torch.randn(2, PAGES * 64, HEADS, DIM, generator=generator).bfloat16()
    pages.write(0, k * 2, v)
    pages.summarise(0, PAGES, setup(name))
    q = torch.randn(HEADS, GROUP, 8 * 64 - 20, DIM, generator=generator)
    return pages, q


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("oracle:superblock=512,tau=0,budget=0.4", ExactMass()),
        ("mean:superblock=512,budget=0.4", MeanKey()),
        ("quest:superblock=64,budget=0.4", MinMax()),
    ],
)
def test_chooses_what_the_reference_chooses(name: str, estimator: Estimator) -> None:
    pages, q = filled(name)
    start = 16 * 64
    chosen = choose(SuperblockQueries(start, q), pages, setup(name))
    rows = setup(name).settings.scored_rows(start, q.shape[2])
    selection = replace(setup(name).selection, representatives=rows)
    k, v = pages.k.float(), pages.v.float()
    counts = torch.full((PAGES,), 64)
    counts[-1] = 64 - 20
    summaries = summarise(k, v, counts, estimator.needs)
    blocks = [
        reference.Block.of(q[:, :, at:], start + at, k, v, counts, 64)
        for at in range(0, q.shape[2], 64)
    ]
    wanted = reference.choose(blocks, summaries, estimator, selection)
    for mine, theirs in zip(chosen, wanted, strict=True):
        # One page for another, where shares are nearly equal: means are bf16 here, and products of
        # matrices round as memory happens to be aligned.
        assert int((mine != theirs).sum()) <= 2
        assert 0 < int(mine.sum()) < mine.numel()


def test_tail_is_the_reference_tail() -> None:
    pages, q = filled("oracle")
    kept = [
        torch.rand(HEADS, 16 + n, generator=torch.Generator().manual_seed(n)) > 0.3
        for n in range(8)
    ]
    o, lse = mean_tail(q, 16 * 64, pages, kept)
    counts = torch.full((16,), 64)
    summaries = summarise(pages.k.float()[:16], pages.v.float()[:16], counts)
    theirs, their_lse = tail_partial(q[:, :, :64], summaries, kept[0])
    assert torch.allclose(o[:64], theirs.permute(2, 0, 1, 3).flatten(1, 2), atol=0.02)
    assert torch.allclose(lse[:64], their_lse.permute(2, 0, 1).flatten(1), atol=0.02)


def test_questions_of_a_document_share_its_ids() -> None:
    cases = Cases()
    group = cases.group("mixed", 1024, "end", 0, 3)
    whole = cases.tokenizer.decode(group.prompts[0].prompt, skip_special_tokens=False)
    assert cases.tokenizer.encode(whole).ids == group.prompts[0].prompt
    assert group.shared > 500
    assert {p.task for p in group.prompts} == {"single", "multi", "chain", "count"}


def test_a_tiny_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense answers are right, the null's are not, and what was measured is not measured again."""
    path = tmp_path / "accuracy.json"
    setups = ["dense", "null:minimum=1,budget=0.05,short_to=0", "oracle:short_to=0"]
    given = [
        "--cells",
        "2048:end",
        "--kinds",
        "lookalike",
        "--count",
        "4",
        "--each",
        "4",
        "--judge",
        "paged",
    ]
    monkeypatch.setattr(
        sys, "argv", ["accuracy.py", *given, "--json", str(path), "--setups", *setups]
    )
    with torch.inference_mode():
        accuracy.main()
    rows = json.loads(path.read_text())["raw"]["rows"]
    answers = {row["setup"]: row["answers"]["lookalike"] for row in rows}
    assert answers["dense"] == "1111"
    assert answers[setups[1]].count("1") <= 2
    assert answers["oracle:short_to=0"].count("1") >= 3
    before = path.read_text()
    accuracy.main()
    assert path.read_text() == before
    for row in rows:
        row["setup"] = row["setup"].partition(":")[0]
    assert counting(by_cell(rows), 2048, "end", "paged") == ["lookalike"]
    null, dense = ([row for row in rows if row["setup"] == name] for name in ("null", "dense"))
    assert worst(null, dense, ["lookalike"]) == ("lookalike", pytest.approx(100, abs=50))

"""Answers of the embedded model when its attention is sparse, by estimator, tail and budget.

Two ways to decode: `exact`, as served by default (only the prompt's own attention is sparse), and
`sparse`, in which the answer's tokens too see only selected pages: each must then be the most
likely one, fed the right answer so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gate_capture import SEED, EmbeddedModel, Prompt, dense
from sps_runtime.sparse.estimators.bounds import ExactMass, MinMax, SketchedKeys
from sps_runtime.sparse.estimators.moments import Deviants, MeanKey, MeanVariance
from sps_runtime.sparse.estimators.patterns import Antidiagonal
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.reference import sparse_attention
from sps_runtime.sparse.selection import SelectionSettings
from sps_runtime.sparse.summaries import paged, summarise
from sps_runtime.sparse.tail import TAIL_NEEDS

TASKS = ("single", "lookalike", "multi", "chain", "count")
PAGE = 64


class Nothing:
    """The null: sink and window only."""

    needs: frozenset[str] = frozenset()

    def log_mass(self, q_KGRD: Tensor, pages: Any) -> Tensor:
        place = torch.arange(pages.pages) * 1e-3 - 20.0
        return place.expand(*q_KGRD.shape[:3], pages.pages)


@dataclass(frozen=True)
class Setup:
    """One sparse method.

    Attributes:
        bits, low_rank: of the sketch.
        settings: what is always kept, how many rows are scored.
    """

    estimator: Estimator | None
    tail: str = "mean"
    bits: int = 2
    low_rank: bool = False
    rows: int = 0
    budget: float = 0.15
    block: int = PAGE
    decodes: tuple[str, ...] = ("sparse",)
    extra: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> SelectionSettings:
        return SelectionSettings(
            tau=0.0,
            budget=self.budget,
            block=self.block,
            representatives=self.rows,
            **{"reduce": "max", **self.extra},
        )


BOTH = ("exact", "sparse")
SETUPS: dict[str, Setup] = {
    "dense": Setup(None, "none", budget=1.0, decodes=BOTH),
    "null": Setup(Nothing(), "none", decodes=BOTH),
    "null+tail": Setup(Nothing()),
    "oracle": Setup(ExactMass(), decodes=BOTH),
    "oracle, no tail": Setup(ExactMass(), "none"),
    "mean": Setup(MeanKey()),
    "mean+variance": Setup(MeanVariance()),
    "mean+2 deviants": Setup(Deviants(2)),
    "min-max (Quest)": Setup(MinMax()),
    "antidiagonal 8": Setup(Antidiagonal(8)),
    "sketch 1 bit": Setup(SketchedKeys(), bits=1),
    "sketch 2 bits": Setup(SketchedKeys(), decodes=BOTH),
    "sketch 2 bits, no tail": Setup(SketchedKeys(), "none"),
    "sketch 2 bits, variance tail": Setup(SketchedKeys(), "variance"),
    "sketch 2 bits, mean share": Setup(SketchedKeys(), extra={"reduce": "mean"}),
    "sketch 2 bits, 16 rows": Setup(SketchedKeys(), rows=16),
    "sketch 2 bits, 4 rows": Setup(SketchedKeys(), rows=4),
    "sketch 2 bits, blocks of 128": Setup(SketchedKeys(), block=128),
    "sketch 2 bits, 10%": Setup(SketchedKeys(), budget=0.10),
    "sketch 2 bits, 5%": Setup(SketchedKeys(), budget=0.05),
    "sketch 2 bits, superblocks, 10%": Setup(
        SketchedKeys(), rows=16, budget=0.10, extra={"fetch_block": 1024}
    ),
    "sketch 2 bits, superblocks, 15%": Setup(SketchedKeys(), rows=16, extra={"fetch_block": 1024}),
    "sketch 2 bits, 4 rows, 10%": Setup(SketchedKeys(), rows=4, budget=0.10),
    "sketch 2 bits, 4 rows, 5%": Setup(SketchedKeys(), rows=4, budget=0.05),
    "sketch rank 16, 4 bits, 4 rows": Setup(SketchedKeys(), bits=4, low_rank=True, rows=4),
    "sketch rank 16, 4 bits": Setup(SketchedKeys(), bits=4, low_rank=True),
    "sketch rank 16, 2 bits": Setup(SketchedKeys(), bits=2, low_rank=True),
}
QUICK = ["dense", "null", "mean", "min-max (Quest)", "sketch 2 bits, 16 rows"]


class SparseAttention:
    """`Attend` of gate_capture, all of it sparse; counts the pairs that it reads."""

    def __init__(self, setup: Setup, bases: list[Tensor], scale: float) -> None:
        self.setup, self.bases, self.scale = setup, bases, scale
        self.read = self.causal = 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        setup = self.setup
        estimator = setup.estimator
        if estimator is None:
            return dense(q, k, v, start)
        basis = self.bases[layer] if setup.low_rank else None
        if basis is not None:
            estimator = SketchedKeys(basis)
        k_pages, counts = paged(k, PAGE)
        v_pages, _ = paged(v, PAGE)
        needs = estimator.needs | TAIL_NEEDS[setup.tail]
        pages = summarise(k_pages, v_pages, counts, needs, sketch_bits=setup.bits, basis_KDR=basis)
        settings = setup.settings()
        found = sparse_attention(
            q, k, v, pages, estimator, settings, start=start, scale=self.scale, tail=setup.tail
        )
        own = setup.block // PAGE
        for _, kept in found.kept:
            self.read += int(kept.sum()) + own * len(kept)
            self.causal += kept.numel() + own * len(kept)
        return found.o_THD


def answer(
    model: EmbeddedModel,
    bases: list[Tensor],
    task: str,
    length: int,
    names: list[str] | None,
    count: int,
) -> Iterator[dict[str, Any]]:
    """One row for each setup and way to decode: questions asked, answers right, density."""
    prompts = model.prompts(task, length, count, SEED)
    for name in names or SETUPS:
        setup = SETUPS[name]
        attend = SparseAttention(setup, bases, model.scale)
        unit = setup.settings().fetch_block or setup.block
        shared = shared_prefix(prompts) // unit * unit
        cache: list[tuple[Tensor, Tensor]] = []
        model.forward(prompts[0].prompt[:shared], attend, cache, 0)
        for decode in setup.decodes:
            each = [_loss(model, attend, p, list(cache), shared, decode) for p in prompts]
            yield {
                "task": task,
                "length": length,
                "seed": SEED,
                "estimator": name,
                "tail": setup.tail,
                "budget": setup.budget,
                "decode": decode,
                "asked": len(each),
                "right": sum(right for right, _ in each),
                "nats_per_token": round(sum(loss for _, loss in each) / len(each), 4),
                "density": round(attend.read / attend.causal, 4) if attend.causal else 1.0,
            }


def _loss(
    model: EmbeddedModel,
    attend: SparseAttention,
    prompt: Prompt,
    cache: list[tuple[Tensor, Tensor]],
    shared: int,
    decode: str,
) -> tuple[bool, float]:
    """Whether the answer is the greedy one, and its mean negative log likelihood."""
    ids = (prompt.prompt + prompt.answer)[:-1]
    if decode == "exact":
        model.forward(prompt.prompt, attend, cache, shared)
        start = len(prompt.prompt) - 1
        hidden = model.forward(ids, lambda _, *parts: dense(*parts), cache, start)
    else:
        hidden = model.forward(ids, attend, cache, shared)
    logits = model.model.head(hidden[0, -len(prompt.answer) :])
    wanted = torch.tensor(prompt.answer)
    likely = logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return bool((logits.argmax(-1) == wanted).all()), -float(likely.mean())


def shared_prefix(prompts: list[Prompt]) -> int:
    """Tokens that all prompts begin with, less than the shortest has."""
    shortest = min(len(p.prompt) for p in prompts) - 1
    columns = zip(*(p.prompt[:shortest] for p in prompts), strict=True)
    for count, column in enumerate(columns):
        if len(set(column)) > 1:
            return count
    return shortest

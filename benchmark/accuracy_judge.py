"""Is each token of the right answer the most likely one? Asked of one document's questions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accuracy_cases import Group, Prompt
from accuracy_choose import PAGE, LayerPages, Setup
from accuracy_model import Counted, PagedModel
from accuracy_stride import density, shard_of

DENSE = Setup("dense")
RANKS = (2, 4, 8)


@dataclass
class Verdict:
    """One document under one setup.

    Attributes:
        right: for each question, in order.
        nats: mean negative log likelihood of an answer's tokens.
        density: read over causal pairs of one prompt.
        unions: ranks -> fetched and remote (page, KV head, layer), of the document's first prompt
            over contiguous shards of whole superblocks.
    """

    right: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    density: float = 1.0
    unions: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0


def judge(model: PagedModel, group: Group, setup: Setup, decode: str = "sparse") -> Verdict:
    """Feed each prompt and its answer as one prefill. With `decode` ``exact`` the answer's tokens,
    as served by default, read everything."""
    begin = time.monotonic()
    store, prefix, rest = model.store(), Counted(), Counted()
    tokens = max(len(prompt.ids) for prompt in group.prompts)
    setup = replace(setup, settings=setup.settings.for_prompt(tokens))
    if setup.estimator == "stride":
        setup = replace(setup, shard=shard_of(tokens, setup))
    unit = PAGE if setup.estimator == "dense" else max(setup.settings.superblock, PAGE)
    shared = group.shared // (setup.shard or unit) * (setup.shard or unit)
    if shared:
        model.forward(group.prompts[0].ids[:shared], 0, store, setup, prefix)
    verdict = Verdict()
    for prompt in group.prompts:
        right, nats = _answered(model, store, prompt, shared, setup, rest, decode)
        verdict.right.append(right)
        verdict.nats.append(round(nats, 4))
    if rest.causal_pairs:
        n = len(group.prompts)
        read = prefix.read_pairs + rest.read_pairs / n
        verdict.density = round(read / (prefix.causal_pairs + rest.causal_pairs / n), 5)
        sets = prefix.sets | rest.sets
        verdict.unions = {p: union(sets, p, max(unit, 1024) // PAGE) for p in RANKS}
    if setup.shard:
        verdict.density = round(density(tokens, setup), 5)
    verdict.seconds = round(time.monotonic() - begin, 2)
    return verdict


def _answered(
    model: PagedModel,
    store: list[LayerPages],
    prompt: Prompt,
    shared: int,
    setup: Setup,
    counted: Counted,
    decode: str,
) -> tuple[bool, float]:
    if decode == "exact":
        model.forward(prompt.prompt, shared, store, setup, counted)
        start = len(prompt.prompt) - 1
        hidden = model.forward(prompt.ids, start, store, DENSE, counted)
    else:
        hidden = model.forward(prompt.ids, shared, store, setup, counted)
    return agreed(model.model.head(hidden[-len(prompt.answer) :]), prompt.answer)


def agreed(logits: Tensor, answer: list[int]) -> tuple[bool, float]:
    """Whether every token of the answer is the greedy one, and its mean nats."""
    wanted = torch.tensor(answer)
    likely = logits.float().log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return bool((logits.argmax(-1) == wanted).all()), -float(likely.mean())


def union(sets: dict[tuple[int, int], Tensor], ranks: int, superblock: int) -> tuple[int, int]:
    """Fetched and remote (page, KV head, layer) over contiguous shards of whole superblocks of
    `superblock` pages: each rank wants a page once, however many of its blocks read it."""
    firsts = sorted({first for _, first in sets})
    count = firsts[-1] // superblock + 1
    ends = [rank * count // ranks * superblock for rank in range(ranks + 1)]
    fetched = remote = 0
    for layer in {layer for layer, _ in sets}:
        for rank in range(1, ranks):
            begin, end = ends[rank], ends[rank + 1]
            mine = [sets[layer, f][:, :begin] for f in firsts if begin <= f < end]
            if mine:
                remote += mine[0].numel()
                fetched += int(torch.stack(mine).any(0).sum())
    return fetched, remote


def bytes_per_token(
    unions: tuple[int, int], tokens: int, layers: int, summary: int, head_dim: int = 64
) -> dict[str, Any]:
    """Logical remote bytes of a token and layer: chosen pages (K and V in 2 bytes), summaries of
    all remote pages, 4 bytes an id."""
    fetched, remote = unions
    page = 2 * PAGE * head_dim * 2
    each = tokens * layers
    return {
        "pages": fetched * page / each,
        "summaries": remote * summary / each,
        "ids": fetched * 4 / each,
    }

"""What exact means (docs/design.md, contract 6), as requests to run and a comparison to make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import Run, ThreadEngine, drive
from torch import Tensor

NEW_TOKENS = 64
CHUNKS = (64, 1000, 0)
MARGIN, LOGIT_ERROR = 1e-3, 1e-4
TIGHT_PAGES = {16: 700, 64: 200}


@dataclass(frozen=True)
class Truth:
    """What the one-rank reference says after a prompt.

    Attributes:
        logits_NV: one row per new token.
    """

    tokens: list[int]
    logits_NV: Tensor

    def margin(self, index: int) -> float:
        first, second = self.logits_NV[index].topk(2).values.tolist()
        return float(first - second)


@cache
def truth(kind: str, tokens: tuple[int, ...]) -> Truth:
    """One rank, the whole prompt in one step, one step at a time, alone."""
    model = exact_model(kind)
    engine = ThreadEngine(model.config, model.arena(), page_size=64, pages_per_rank=24)
    request = Request(list(tokens), NEW_TOKENS)
    run = drive(engine, Planner(Shape(1, 64, 24, decode="sharded", overlap=False)), [request])
    engine.close()
    return Truth(request.sampled, torch.stack(run.logits[0]))


def requests_of_a_cell(page_size: int) -> list[Request]:
    """Prompts of 1 token, a page more or less one, and of no special length, at every chunk size;
    warm ones that share all whole pages or half of the prompt; some that are cancelled while they
    prefill or decode, so that their pages are written again by others."""
    lengths = (1, page_size - 1, page_size, page_size + 1, 151, 1037)
    cold = [
        Request(prompt(length), NEW_TOKENS, chunk=chunk, arrival=index)
        for index, chunk in enumerate(CHUNKS)
        for length in lengths
    ]
    cancelled = [
        Request(prompt(1100, seed=1), chunk=64, arrival=1, cancel_after=3),
        Request(prompt(300, seed=2), chunk=0, arrival=1, cancel_after=9),
        Request(prompt(40, seed=3), chunk=64, arrival=2, cancel_after=20),
    ]
    warm = [
        Request(source.prompt, NEW_TOKENS, chunk=64 * (index % 2), prefix_of=source)
        for index, source in enumerate(cold[: len(lengths)])
        if len(source.prompt) > page_size
    ]
    forked = [
        Request(source.prompt[: len(source.prompt) // 2] + prompt(33), chunk=1000, prefix_of=source)
        for source in cold[4:6]
    ]
    return [*cancelled, *cold, *warm, *forked]


def check(kind: str, engine: ThreadEngine, shape: Shape, requests: list[Request], run: Run) -> None:
    """Identical greedy tokens; where the reference's margin is too small to say, the rest is
    teacher-forced; logits agree all along."""
    doubtful = []
    for request in requests:
        if request.cancel_after is not None:
            continue
        assert len(request.sampled) == NEW_TOKENS
        expected = truth(kind, tuple(request.prompt))
        same = first_difference(request.sampled, expected.tokens)
        _logits_agree(run.logits[request.slot][: same + 1], expected)
        if same < NEW_TOKENS:
            where = f"prompt of {len(request.prompt)}, chunk {request.chunk}, token {same}"
            assert expected.margin(same) < MARGIN, where
            doubtful.append(Request(request.prompt, NEW_TOKENS, forced=expected.tokens))
    if doubtful:
        planner = Planner(shape, epoch=run.plans[-1].epoch)
        forced = drive(engine, planner, doubtful)
        for request in doubtful:
            _logits_agree(forced.logits[request.slot], truth(kind, tuple(request.prompt)))


def check_tokens(kind: str, requests: list[Request]) -> None:
    """`check` where no logits can be seen: tokens up to where the reference is not sure."""
    for request in requests:
        if request.cancel_after is None:
            expected = truth(kind, tuple(request.prompt))
            same = first_difference(request.sampled, expected.tokens)
            assert same == NEW_TOKENS or expected.margin(same) < MARGIN


def first_difference(a: list[int], b: list[int]) -> int:
    """Index of the first difference; the length where there is none."""
    pairs = zip(a, b, strict=True)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), len(a))


def _logits_agree(rows: list[Tensor], expected: Truth) -> None:
    got_NV = torch.stack(rows)
    error = (got_NV - expected.logits_NV[: len(rows)]).abs().max()
    assert error < LOGIT_ERROR, f"logits differ by {error:.1e}"

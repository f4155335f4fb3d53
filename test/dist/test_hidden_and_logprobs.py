"""Hidden states and logprobs through the real scheduler and real ranks: what transformers says.

Prompts share prefixes and come twice, in chunks, at every degree, beside others that generate.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.thread_engine import ThreadEngine
from test.dist.test_scheduler_and_ranks import CELLS, CSA, CSA_CELLS, KIND, make_scheduler
from torch import Tensor

from sps_runtime.types.attention import EXACT, AttentionSpec
from sps_runtime.types.messages import TokensOut
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import LogprobParams, SamplingParams
from sps_runtime.types.tokens import pack_ids, unpack_ids

BOUND = 1e-4
"""Of every logprob and of every element of a hidden state, in fp32; elements are about 1."""
TOP, WANTED = 3, (7, 150)


@cache
def oracle(tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """transformers: log-probabilities ``[tokens, vocab]``, the last token's hidden state."""
    with torch.inference_mode():
        out = exact_model(KIND).oracle(torch.tensor([tokens]), output_hidden_states=True)
    return torch.log_softmax(out.logits[0], -1), out.hidden_states[-1][0, -1]


def traffic(chance: random.Random, attention: AttentionSpec) -> list[GenerateRequest]:
    """Every prompt twice, for its hidden state and for logprobs; two in three with `attention`."""
    base = prompt(150, seed=5)
    prompts = [base, base[:64], base[:65] + prompt(7), base[:100] + prompt(40), prompt(1)]
    prompts += [prompt(length, seed=6) for length in (16, 17, 63)]
    requests = []
    for tokens in prompts * 2:
        start = chance.choice([-1, 0, 1, len(tokens) // 2, len(tokens) - 1])
        wants = LogprobParams(top=TOP, token_ids=WANTED, prompt_start=start)
        for hidden_state in (True, False):
            count = 0 if hidden_state else chance.choice([0, 1, 6])
            params = SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
            requests.append(
                GenerateRequest(
                    f"r{len(requests)}",
                    pack_ids(tokens),
                    params,
                    attention=attention if chance.random() < 0.66 else EXACT,
                    logprobs=None if hidden_state else wants,
                    hidden_state=hidden_state,
                )
            )
    return requests


def serve(cell: tuple, requests: list[GenerateRequest], chance: random.Random) -> list[TokensOut]:
    """All news, in order."""
    sp, tp, arch, _, page_size, _, pages, _ = cell
    model = exact_model(KIND)
    engine = ThreadEngine(
        model.config,
        model.arena(tp),
        sp=sp,
        tp=tp,
        arch=arch,
        page_size=page_size,
        pages_per_rank=pages,
    )
    scheduler, waiting, owed = make_scheduler(cell), requests[::-1], 0
    news: list[TokensOut] = []
    try:
        while waiting or owed or not scheduler.idle:
            if waiting and chance.random() < 0.4:
                news += scheduler.add(waiting.pop())
            for plan in scheduler.next_plans():
                engine.send(plan)
                owed += len(plan.group) * engine.tp
            if owed:
                news += scheduler.on_result(engine.next_answer().result)
                owed -= 1
    finally:
        engine.close()
    assert scheduler.state().cached_tokens_total > 0
    return news


def error_of(entry: TokenLogprobs, row_V: Tensor) -> float:
    """The largest difference of anything that one entry says."""
    assert entry.logprob is not None
    said = [(entry.token, entry.logprob), *entry.wanted]
    differences = [abs(value - float(row_V[token])) for token, value in said]
    best = row_V.topk(TOP).values.tolist()
    assert [token for token, _ in entry.top] == sorted(
        (token for token, _ in entry.top), key=lambda token: -dict(entry.top)[token]
    )
    differences += [abs(v - b) for (_, v), b in zip(entry.top, best, strict=True)]
    return max(differences)


def logprob_error(request: GenerateRequest, news: list[TokensOut]) -> float:
    prompt_ids = unpack_ids(request.tokens).tolist()
    tokens = prompt_ids + [token for item in news for token in item.tokens]
    rows, _ = oracle(tuple(tokens))
    judged = [entry for item in news for entry in item.prompt_logprobs]
    wants = request.logprobs
    assert wants is not None
    assert len(judged) == (len(prompt_ids) - wants.prompt_start if wants.prompt_start >= 0 else 0)
    if wants.prompt_start == 0:
        assert judged[0] == TokenLogprobs(prompt_ids[0], None)
    entries = dict(enumerate(judged, wants.prompt_start)) if judged else {}
    entries.pop(0, None)
    sampled = [entry for item in news for entry in item.logprobs]
    assert len(sampled) == request.sampling.max_new_tokens
    entries |= dict(enumerate(sampled, len(prompt_ids)))
    assert all(entry.token == tokens[position] for position, entry in entries.items())
    assert all({token for token, _ in entry.wanted} == set(WANTED) for entry in entries.values())
    return max((error_of(entry, rows[p - 1]) for p, entry in entries.items()), default=0.0)


@pytest.mark.parametrize("cell", CELLS, ids=["-".join(map(str, cell[:7])) for cell in CELLS])
def test_what_is_reported_is_what_transformers_says(cell: tuple) -> None:
    check(cell, EXACT)


@pytest.mark.parametrize("cell", CSA_CELLS, ids=["-".join(map(str, c[:7])) for c in CSA_CELLS])
def test_under_csa_that_leaves_nothing_out_too(cell: tuple) -> None:
    check(cell, CSA)


def check(cell: tuple, attention: AttentionSpec) -> None:
    torch.set_num_threads(1)
    chance = random.Random(str(cell))
    requests = traffic(chance, attention)
    news = serve(cell, requests, chance)
    worst = {"hidden": 0.0, "logprob": 0.0}
    for request in requests:
        mine = [item for item in news if item.rid == request.rid]
        assert [item.finish is not None for item in mine] == [False] * (len(mine) - 1) + [True]
        if not request.hidden_state:
            worst["logprob"] = max(worst["logprob"], logprob_error(request, mine))
            continue
        _, expected_D = oracle(tuple(unpack_ids(request.tokens)))
        got_D = torch.frombuffer(bytearray(mine[-1].hidden_state), dtype=torch.float32)
        assert got_D.shape == expected_D.shape
        worst["hidden"] = max(worst["hidden"], float((got_D - expected_D).abs().max()))
    print(cell, worst)
    assert 0.0 < max(worst.values()) < BOUND, worst

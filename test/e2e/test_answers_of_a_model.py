"""Numbers that a whole engine of several rank processes answers with: what transformers says.

`test/dist/test_hidden_and_logprobs.py` has more degrees, chunks and cache states, in threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.kit import tokenizers as kinds
from torch import Tensor

from sps_runtime.engine import Engine

KIND, BOUND = "qwen3", 1e-3
PROMPTS = [prompt(150, seed=5), prompt(70, seed=6), prompt(1)]


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["sp2", "tp2"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    sp, tp = request.param
    directory = tmp_path_factory.mktemp("model")
    shutil.copytree(exact_model(KIND).directory, directory, dirs_exist_ok=True)
    kinds.write_directory(directory, kinds.wordpiece_tokenizer())
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "sp_size": sp,
        "tp_size": tp,
        "page_size": 16,
        "max_total_tokens": 4096,
        "chunked_prefill_size": 64,
    }
    with Engine(str(directory), **settings) as running:
        yield running


def oracle(tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[tokens, vocab]``, the last token's hidden state."""
    with torch.inference_mode():
        out = exact_model(KIND).oracle(torch.tensor([tokens]), output_hidden_states=True)
    return torch.log_softmax(out.logits[0], -1), out.hidden_states[-1][0, -1]


def test_vectors_cold_and_cached(engine: Engine) -> None:
    engine.flush_cache()
    for cached in (0, 64):
        answers = engine.encode(input_ids=PROMPTS, normalize=False)
        assert answers[0]["meta_info"]["cached_tokens"] >= cached
        for tokens, answer in zip(PROMPTS, answers, strict=True):
            _, expected_D = oracle(tokens)
            assert (torch.tensor(answer["embedding"]) - expected_D).abs().max() < BOUND


@pytest.mark.parametrize("start", [0, 100, 150])
def test_logprobs_of_input_output_top_and_wanted(engine: Engine, start: int) -> None:
    wants = {
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": 3,
        "token_ids_logprob": [5, 200],
    }
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    for _ in range(2):  # cold or cached, whatever the start leaves
        answer = engine.generate(input_ids=PROMPTS[0], sampling_params=sampling, **wants)
        meta, tokens = answer["meta_info"], PROMPTS[0] + answer["output_ids"]
        rows, _ = oracle(tokens)
        assert len(meta["input_token_logprobs"]) == 150 - start
        named = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
        entries = [
            list(pair)
            for pair in zip(
                *(meta[f"input_{name}"] + meta[f"output_{name}"] for name in named), strict=True
            )
        ]
        if start == 0:
            assert entries[0] == [[None, tokens[0], None], None, None]
        for position, (chosen, top, wanted) in enumerate(entries, start):
            if position == 0:
                continue
            row_V = rows[position - 1]
            assert chosen[1] == tokens[position] and [pair[1] for pair in top] == sorted(
                (pair[1] for pair in top), key=lambda token: -float(row_V[token])
            )
            assert {pair[1] for pair in wanted} == {5, 200}
            assert top[0][0] == pytest.approx(float(row_V.max()), abs=BOUND)
            for value, token, _ in (chosen, *top, *wanted):
                assert value == pytest.approx(float(row_V[token]), abs=BOUND)


def test_scores(engine: Engine) -> None:
    labels = [3, 77, 298]
    scores = engine.score(PROMPTS[0], [[4], [9, 9]], labels)
    for item, found in zip(([4], [9, 9]), scores, strict=True):
        rows, _ = oracle(PROMPTS[0] + item)
        assert found == pytest.approx(rows[-1][labels].exp().tolist(), rel=BOUND)

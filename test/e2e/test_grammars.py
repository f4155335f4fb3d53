"""Grammars through a whole engine with the embedded model, however its ranks share the work."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from test.kit.random_grammars import Case, random_case

from sps_runtime.engine import Engine
from sps_runtime.server.answers import AnswerFailed

CASES = [random_case(random.Random(seed)) for seed in range(1000, 1048)]
PROMPT = "The weather was fine and the streets were quiet. " * 12
SETTINGS: dict[str, dict[str, Any]] = {
    "sp2": {"sp_size": 2, "chunked_prefill_size": 64, "page_size": 16},
    "tp2": {"tp_size": 2},
}


def sampling(case: Case, seed: int) -> dict[str, Any]:
    # Half of them greedy: a weak model repeats itself then, and its grammar has to end it.
    common = {"temperature": seed % 2 * 1.0, "sampling_seed": seed, "max_new_tokens": 700}
    return {**common, case.kind: case.spec.source}


@pytest.fixture(scope="module", params=list(SETTINGS))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    settings = SETTINGS[request.param]
    with Engine(dtype="float32", max_total_tokens=65536, **settings) as running:
        yield running


ANSWERS: dict[str, list[str]] = {}
"""The first engine's, which the second one's must equal."""


def test_no_grammar_is_violated_and_every_answer_ends(engine: Engine) -> None:
    params = [sampling(case, seed) for seed, case in enumerate(CASES)]
    answers = engine.generate([f"{i} {PROMPT}" for i in range(len(CASES))], params)
    for i, (case, answer) in enumerate(zip(CASES, answers, strict=True)):
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", (i, case.spec, answer)
        assert case.holds(answer["text"]), (i, case.spec, answer["text"])
    texts = [answer["text"] for answer in answers]
    assert ANSWERS.setdefault("texts", texts) == texts, "degrees differ"


def test_a_stream_says_the_same(engine: Engine) -> None:
    case = CASES[1]
    whole = engine.generate(PROMPT, sampling(case, 1))
    events = list(engine.generate(PROMPT, sampling(case, 1), stream=True))
    assert events[-1]["text"] == whole["text"] and case.holds(whole["text"])
    assert events[-1]["output_ids"] == whole["output_ids"]


def test_choices_of_one_prompt(engine: Engine) -> None:
    params = {"regex": "[a-z]{8}[0-9]", "n": 4, "max_new_tokens": 30, "sampling_seed": 5}
    texts = [answer["text"] for answer in engine.generate("abc", params)]
    assert len(texts) == 4 and len(set(texts)) > 1
    assert all(len(text) == 9 and text[8].isdigit() for text in texts)


def test_stop_tokens_do_not_break_a_grammar(engine: Engine) -> None:
    """Below min_new_tokens the end is forbidden; a grammar that has nothing else ends all the same,
    and ignore_eos does not make it go on."""
    params = {"regex": "yes|no", "min_new_tokens": 20, "max_new_tokens": 40, "ignore_eos": True}
    answer = engine.generate("Well? ", params)
    assert answer["text"] in ("yes", "no")
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_grammar_too_hard_to_follow_ends_one_request(engine: Engine) -> None:
    with pytest.raises(AnswerFailed) as caught:
        engine.generate("x", {"regex": "((a{1,1000}){1,1000}){1,1000}", "max_new_tokens": 50})
    assert caught.value.status == 400 and "grammar" in caught.value.message
    assert engine.generate("x", {"regex": "[0-9]{2}", "max_new_tokens": 8})["text"].isdigit()

"""The offline engine over echo ranks: answers, streams, errors, and its end in every way."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from test.kit.echo_engine import alive, children_of, eventually
from test.kit.echo_http import EOS, ROOT, write_model

from sps_runtime.engine import Engine
from sps_runtime.runner.echo_answers import (
    echo_generate,
    echo_hidden,
    entries_of,
    made_up_logprobs,
    prefix_states,
)
from sps_runtime.types.errors import ConfigError, EngineDead, InvalidRequest, SpsError

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(str(model), device="echo", sp_size=2, page_size=16) as running:
        yield running


def expected(engine: Engine, prompt: list[int], count: int = 12) -> list[int]:
    vocab = len(engine.tokenizer._fast.get_vocab())
    return echo_generate(prompt, count, vocab=vocab)


def test_one_prompt_and_many(engine: Engine) -> None:
    ids = engine.tokenizer.encode("hello there")
    one = engine.generate("hello there", GREEDY)
    assert one["output_ids"] == expected(engine, ids)
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    prompts = [[5, 6, 7], list(range(100)), [9]]
    many = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [answer["output_ids"] for answer in many] == [expected(engine, p) for p in prompts]


def test_vectors(engine: Engine) -> None:
    prompts = [[5, 6, 7], list(range(100)), [9]]
    many = engine.encode(input_ids=prompts, normalize=False)
    expected_vectors = [array("f", echo_hidden(prompt)).tolist() for prompt in prompts]
    assert [answer["embedding"] for answer in many] == expected_vectors
    assert many[1]["meta_info"]["prompt_tokens"] == 100
    one = engine.encode("hello there")
    assert sum(value * value for value in one["embedding"]) == pytest.approx(1, abs=1e-5)
    assert len(engine.encode(input_ids=[[1]] * 70)) == 70
    with pytest.raises(InvalidRequest, match="normalise"):
        engine.encode("x", normalise=True)


def test_scores(engine: Engine) -> None:
    (plain,) = engine.score([5, 6], [[7]], [1, 2])
    state = int(prefix_states(entries_of([5, 6, 7], 0))[-1])
    vocab = len(engine.tokenizer._fast.get_vocab())
    right = dict(made_up_logprobs(state, 0, 0, (1, 2), vocab).wanted)
    assert plain == pytest.approx([math.exp(right[1]), math.exp(right[2])])
    shares = engine.score("a", ["b", "c"], [1, 2, 3], apply_softmax=True)
    assert [sum(share) for share in shares] == pytest.approx([1, 1])
    with pytest.raises(InvalidRequest, match="label_token_ids"):
        engine.score("a", "b", [])


def test_streams_are_cumulative_and_end_early_without_harm(engine: Engine) -> None:
    events = list(engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY, stream=True))
    assert events[-1]["output_ids"] == expected(engine, [1, 2, 3])
    lengths = [len(event["output_ids"]) for event in events]
    assert lengths == sorted(lengths)
    endless = {**GREEDY, "max_new_tokens": 30_000}
    for event in engine.generate(input_ids=[4], sampling_params=endless, stream=True):
        if len(event["output_ids"]) > 5:
            break
    eventually(lambda: engine.state().running == 0, 5.0, "the dropped stream ends")


def test_asyncio_callers(engine: Engine) -> None:
    async def scenario() -> tuple[list[dict], list[dict]]:
        asked = [engine.async_generate(input_ids=[i], sampling_params=GREEDY) for i in range(20)]
        answers = await asyncio.gather(*asked)
        stream = await engine.async_generate(input_ids=[7], sampling_params=GREEDY, stream=True)
        return answers, [event async for event in stream]

    answers, events = asyncio.run(scenario())
    assert [a["output_ids"] for a in answers] == [expected(engine, [i]) for i in range(20)]
    assert events[-1]["output_ids"] == expected(engine, [7])


def test_many_threads(engine: Engine) -> None:
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answer = engine.generate(input_ids=[number, number], sampling_params=GREEDY)
        answers[number] = answer["output_ids"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {number: expected(engine, [number, number]) for number in range(8)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ""},
        {},
        {"prompt": "x", "sampling_params": {"temperature": -1}},
        {"prompt": "x", "sampling_params": {"no_such": 1}},
        {"input_ids": [10**6]},
        {"prompt": "x", "no_such_field": 1},
        {"prompt": 5},
    ],
)
def test_bad_input_is_named(engine: Engine, arguments: dict) -> None:
    with pytest.raises(InvalidRequest):
        engine.generate(**arguments)
    assert engine.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"]


def test_cache_and_state(engine: Engine) -> None:
    prompt = list(range(3, 300))
    engine.generate(input_ids=prompt, sampling_params=GREEDY)
    again = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] > 200
    eventually(engine.flush_cache, 5.0, "the cache is flushed")
    cold = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert engine.state().generated_tokens_total > 0


def test_settings_that_cannot_be(model: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'sp_sise'"):
        Engine(str(model), device="echo", sp_sise=2)
    with pytest.raises(ConfigError, match="tp_size 3"):
        Engine(str(model), device="echo", tp_size=3)
    with pytest.raises(ConfigError, match="nonsense"):
        Engine(str(model), device="echo", policy="nonsense")


def test_a_dead_rank_fails_who_waits_and_who_comes(model: Path) -> None:
    with Engine(str(model), device="echo", sp_size=2, echo_delay_s=0.01) as engine:
        rank = engine._family.processes.children[1].process.pid
        threading.Timer(0.5, os.kill, (rank, signal.SIGKILL)).start()
        endless = {**GREEDY, "max_new_tokens": 30_000}
        began = time.monotonic()
        with pytest.raises(SpsError):
            engine.generate(input_ids=[[n] for n in range(8)], sampling_params=endless)
        assert time.monotonic() - began < 4.0
        with pytest.raises(EngineDead):
            engine.generate("too late", GREEDY)


PROGRAM = """
import sys, time
from sps_runtime.engine import Engine
engine = Engine(sys.argv[1], device="echo", sp_size=2)
print(engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 3})["output_ids"])
sys.stdout.flush()
if sys.argv[2] == "sleep":
    time.sleep(60)
if sys.argv[2] == "raise":
    raise ZeroDivisionError
"""


@pytest.mark.parametrize("ending", ["return", "raise", "sleep"])
def test_nothing_outlives_the_program(model: Path, ending: str) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as temporary:
        path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model), ending],
            env={**os.environ, "TMPDIR": temporary, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert program.stdout is not None
        assert program.stdout.readline().startswith(b"[")
        children = children_of(program.pid)
        if ending == "sleep":
            assert len(children) == 3
            program.kill()
        program.wait(10)
        program.stdout.close()
        eventually(lambda: not any(map(alive, children)), 5.0, "the children end")
        eventually(lambda: not os.listdir(temporary), 2.0, "the run directory is gone")


def test_the_model_of_this_test_has_an_eos(engine: Engine) -> None:
    assert engine._frontend.eos_token_ids == (EOS,)

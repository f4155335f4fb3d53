"""Programs of SGLang's front end, unmodified, against a server: ``python dsl_programs.py URL``.

Runs in any environment that has sglang (0.4.10 or newer, without torch); needs nothing of ours.
With ``sps_runtime.lang`` imported in sglang's place it must print the same, and then also runs
without a server: ``python dsl_programs.py engine``.
Checks calls, shapes and streams, not the cleverness of a tiny model; each check returns what
does not depend on chance.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import sglang as sgl

CITIES = ("Paris", "Berlin", "Zurich")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@sgl.function
def greet(s, name):
    s += "Hello, my name is " + name + ".\n"
    s += "I live in" + sgl.gen("city", max_tokens=8, temperature=0, stop="\n")
    s += "\nGoodbye" + sgl.gen("end", max_tokens=4, temperature=0)


def check_gen() -> Any:
    state = greet.run(name="Ada")
    assert isinstance(state["city"], str) and isinstance(state["end"], str)
    assert state.text().startswith("Hello, my name is Ada.\nI live in" + state["city"])
    assert state.text().endswith("\nGoodbye" + state["end"])
    info = state.get_meta_info("end")
    assert info["completion_tokens"] == 4 and info["finish_reason"]["type"] == "length", info
    return state.text(), info["prompt_tokens"], greet.bind(name="Bo").run().text()


def check_run_batch() -> Any:
    states = greet.run_batch([{"name": name} for name in CITIES], num_threads=4)
    assert [state.text().split()[4] for state in states] == [f"{name}." for name in CITIES]
    assert all(
        state["city"] == greet.run(name=c)["city"] for state, c in zip(states, CITIES, strict=True)
    )
    lazily = greet.run_batch([[name] for name in CITIES], num_threads=2, generator_style=True)
    assert [state.text() for state in lazily] == [state.text() for state in states]
    return [state["city"] for state in states]


def check_stream() -> Any:
    @sgl.function
    def story(s):
        s += "Once upon a time" + sgl.gen("story", max_tokens=200, temperature=0)

    whole = story.run()
    state = story.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == whole.text() and len(pieces) > 1, pieces
    state = story.run(stream=True)
    assert "".join(state.text_iter("story")) == whole["story"]
    assert asyncio.run(pieces_of(story)) == whole["story"]
    return whole.text()


async def pieces_of(story):
    state = story.run(stream=True)
    pieces = state.text_async_iter("story", return_meta_data=True)
    received = [(piece, meta["completion_tokens"]) async for piece, meta in pieces]
    assert received[-1][1] > 1, received
    return "".join(piece for piece, _ in received)


def check_select() -> Any:
    made = []
    methods = (
        None,
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    )
    for method in methods:
        options = {} if method is None else {"choices_method": method}

        @sgl.function
        def judge(s, options=options):
            s += "Is the sky blue? Answer:"
            s += sgl.select("answer", [" yes", " no", " perhaps not"], **options)

        state = judge.run()
        assert state["answer"] in (" yes", " no", " perhaps not")
        info = state.get_meta_info("answer")
        assert len(info["normalized_prompt_logprobs"]) == 3
        assert all(isinstance(p, float) and p < 0 for p in info["normalized_prompt_logprobs"])
        if method is sgl.unconditional_likelihood_normalized:
            assert len(info["normalized_unconditional_prompt_logprobs"]) == 3
        figures = info.get(
            "normalized_unconditional_prompt_logprobs", info["normalized_prompt_logprobs"]
        )
        made.append((state["answer"], [round(figure, 3) for figure in figures]))
    return made


def check_fork_and_join() -> Any:
    @sgl.function
    def tips(s):
        s += "Two tips for a long life: first, sleep. Second, eat well. " * 8
        forks = s.fork(2)
        for i, fork in enumerate(forks):
            fork += f"Tip {i + 1}:" + sgl.gen("tip", max_tokens=8, temperature=0)
        forks.join()
        s += "One: " + forks[0]["tip"] + " Two: " + forks[1]["tip"]
        s += " In short" + sgl.gen("short", max_tokens=4)

    state = tips.run(temperature=0)
    assert isinstance(state["short"], str) and " Two: " in state.text()
    assert len(state["tip"]) == 2

    @sgl.function
    def together(s):
        s += "A list. " * 10
        forks = s.fork(2)
        forks += sgl.gen("item", max_tokens=4)
        forks.join("concate_and_append")
        s += sgl.gen("after", max_tokens=4)

    joined = together.run(temperature=0)
    assert isinstance(joined["after"], str)

    @sgl.function
    def aside(s):
        s += "A question."
        with s.copy() as copied:
            copied += " A thought:" + sgl.gen("thought", max_tokens=4)
        s += " An answer" + sgl.gen("answer", max_tokens=4)

    kept = aside.run(temperature=0)
    assert "thought" not in kept.text()
    return state.text(), joined.text(), kept.text(), kept["thought"]


def check_forks_share_their_prefix() -> None:
    @sgl.function
    def shared(s):
        s += "The weather was fine and the streets were quiet. " * 40
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"Number {i}:" + sgl.gen("more", max_tokens=2)
        s["cached"] = [fork.get_meta_info("more")["cached_tokens"] for fork in forks]

    cached = sorted(shared.run()["cached"])  # one of them may be the first to compute it
    assert all(count > 200 for count in cached[1:]), cached


def check_constraints() -> None:
    @sgl.function
    def constrained(s):
        s += "Address: " + sgl.gen("ip", max_tokens=40, regex=r"((25[0-5]|[0-9]{1,2})\.){3}[0-9]")
        s += "\nPerson: " + sgl.gen("person", max_tokens=200, json_schema=json.dumps(SCHEMA))
        s += "\nCount: " + sgl.gen_int("count", max_tokens=8)
        s += "\nWord: " + sgl.gen("word", dtype=str, max_tokens=200, regex=None)
        s += "\nReal: " + sgl.gen("real", dtype=float, max_tokens=12)
        s += "\nTrue: " + sgl.gen("truth", dtype=bool, max_tokens=8)

    state = constrained.run(temperature=0.7)
    assert state.error() is None
    assert re.fullmatch(r"((25[0-5]|[0-9]{1,2})\.){3}[0-9]", state["ip"]), state["ip"]
    if state.get_meta_info("person")["finish_reason"]["type"] == "stop":
        person = json.loads(state["person"])
        assert set(person) == {"name", "age"}, person
    int(state["count"])
    assert state["word"].startswith('"'), state["word"]
    float(state["real"])
    assert state["truth"].strip() in ("True", "False"), state["truth"]


def check_chat() -> Any:
    @sgl.function
    def talk(s):
        s += sgl.system("You are kind.")
        s += sgl.user("Say hello.")
        s += sgl.assistant(sgl.gen("first", max_tokens=6, temperature=0))
        with s.user():
            s += "And again."
        with s.assistant():
            s += sgl.gen("second", max_tokens=6, temperature=0)

    state = talk.run()
    roles = [message["role"] for message in state.messages()]
    assert roles[-4:] == ["user", "assistant", "user", "assistant"], roles
    assert state.messages()[-1]["content"] == state["second"]
    return state.messages(), state.text()


def check_backend(backend: Any) -> None:
    assert backend.get_model_name() == "embedded"
    backend.flush_cache()
    info = backend.get_server_info()
    assert info["max_total_num_tokens"] > 0 and "internal_states" in info
    backend.cache_prefix("Once upon a time, there was a fox. " * 10)


def main() -> None:
    if sys.argv[1] == "engine":
        runtime = sgl.Runtime(model_path="embedded", device="cpu", sp_size=2)
        backend = runtime.endpoint
    else:
        backend = sgl.RuntimeEndpoint(sys.argv[1])
    sgl.set_default_backend(backend)
    checks = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
    for check in checks:
        made = check(backend) if check is check_backend else check()
        print("ok", check.__name__.removeprefix("check_"), json.dumps(made), flush=True)
    print("sglang", sgl.__version__, "all", len(checks))


if __name__ == "__main__":
    main()

"""Programs of SGLang's front end, unmodified, against a server: ``python dsl_programs.py URL``.

Runs in any environment that has sglang (0.4.10 or newer, without torch); needs nothing of ours.
Checks calls, shapes and streams, not the cleverness of a tiny model.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request

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


def check_gen() -> None:
    state = greet.run(name="Ada")
    assert isinstance(state["city"], str) and isinstance(state["end"], str)
    assert state.text().startswith("Hello, my name is Ada.\nI live in" + state["city"])
    assert state.text().endswith("\nGoodbye" + state["end"])
    info = state.get_meta_info("end")
    assert info["completion_tokens"] == 4 and info["finish_reason"]["type"] == "length", info


def check_run_batch() -> None:
    states = greet.run_batch([{"name": name} for name in CITIES], num_threads=4)
    assert [state.text().split()[4] for state in states] == [f"{name}." for name in CITIES]
    assert all(
        state["city"] == greet.run(name=c)["city"] for state, c in zip(states, CITIES, strict=True)
    )


def check_stream() -> None:
    @sgl.function
    def story(s):
        s += "Once upon a time" + sgl.gen("story", max_tokens=200, temperature=0)

    whole = story.run()
    state = story.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == whole.text() and len(pieces) > 1, pieces
    state = story.run(stream=True)
    assert "".join(state.text_iter("story")) == whole["story"]


def check_select() -> None:
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
            assert info.get("normalized_unconditional_prompt_logprobs") or info


def check_fork_and_join() -> None:
    @sgl.function
    def tips(s):
        s += "Two tips for a long life: first, sleep. Second, eat well. " * 8
        forks = s.fork(2)
        for i, fork in enumerate(forks):
            fork += f"Tip {i + 1}:" + sgl.gen("tip", max_tokens=8, temperature=0)
        forks.join()
        s += "One: " + forks[0]["tip"] + " Two: " + forks[1]["tip"]
        s += " In short" + sgl.gen("short", max_tokens=4)

    state = tips.run()
    assert isinstance(state["short"], str) and " Two: " in state.text()

    @sgl.function
    def together(s):
        s += "A list. " * 10
        forks = s.fork(2)
        forks += sgl.gen("item", max_tokens=4)
        forks.join("concate_and_append")
        s += sgl.gen("after", max_tokens=4)

    assert isinstance(together.run()["after"], str)


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
    assert re.fullmatch(r"((25[0-5]|[0-9]{1,2})\.){3}[0-9]", state["ip"]), state["ip"]
    if state.get_meta_info("person")["finish_reason"]["type"] == "stop":
        person = json.loads(state["person"])
        assert set(person) == {"name", "age"}, person
    int(state["count"])
    assert state["word"].startswith('"'), state["word"]
    float(state["real"])
    assert state["truth"].strip() in ("True", "False"), state["truth"]


def check_chat() -> None:
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


def check_backend(backend: sgl.RuntimeEndpoint) -> None:
    assert "vocab_size" in backend.model_info or backend.get_model_name()
    backend.flush_cache()
    info = backend.get_server_info()
    assert info["max_total_num_tokens"] > 0 and "internal_states" in info
    backend.cache_prefix("Once upon a time, there was a fox. " * 10)


def main() -> None:
    backend = sgl.RuntimeEndpoint(sys.argv[1])
    sgl.set_default_backend(backend)
    checks = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
    for check in checks:
        check(backend) if check is check_backend else check()
        print("ok", check.__name__.removeprefix("check_"), flush=True)
    with urllib.request.urlopen(f"{sys.argv[1]}/health") as answer:
        assert answer.status == 200
    print("sglang", sgl.__version__, "all", len(checks))


if __name__ == "__main__":
    main()

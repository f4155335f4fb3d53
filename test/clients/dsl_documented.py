"""The uses that SGLang's documentation shows, against a server: ``python dsl_documented.py URL``.

One program for each use of the frontend tutorial, the page on choices methods, the page on
reasoning and the quick-start examples: same calls, own words. All calls pass `wire.Wire`, which
checks every answer and stream.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import re
import sys

import sglang as sgl
from checks import Skip, run_all
from sglang.lang.backend import runtime_endpoint
from wire import Wire

NUMBERS = ["one", "two", "three", "four"]
THOUGHT = "<think>It is blue\\.</think>The sky is blue\\."


@sgl.function
def chat(s, first, second):
    s += sgl.system("You answer in few words.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("answer_1", max_tokens=24))
    s += sgl.user(second)
    s += sgl.assistant(sgl.gen("answer_2", max_tokens=24))


ASKED = {"first": "Name a colour.", "second": "Name another one."}


def check_one_question() -> None:
    @sgl.function
    def ask(s, question):
        s += sgl.system("You are kind.")
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("answer", max_tokens=48))

    state = ask("Which three towns lie at the sea?")
    assert isinstance(state["answer"], str)
    assert state.text().count("Which three towns") == 1


def check_turns() -> None:
    state = chat.run(temperature=0, **ASKED)
    messages = state.messages()
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 2
    answers = [state["answer_1"], state["answer_2"]]
    assert [m["content"].strip() for m in messages[2::2]] == [text.strip() for text in answers]
    first, second = state.get_meta_info("answer_1"), state.get_meta_info("answer_2")
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["completion_tokens"]


def check_turns_by_begin_and_end() -> None:
    @sgl.function
    def marked(s):
        s += sgl.system_begin() + "Be brief." + sgl.system_end()
        s += sgl.user_begin()
        s += "Name a river."
        s += sgl.user_end()
        s += sgl.assistant_begin()
        s += "A river: " + sgl.gen("river", max_tokens=6, stop=".") + "."
        s += sgl.assistant_end()

    state = marked.run(temperature=0)
    assert [m["role"] for m in state.messages()] == ["system", "user", "assistant"]
    assert state.messages()[-1]["content"] == f"A river: {state['river']}."


def check_control_flow() -> None:
    @sgl.function
    def tool(s, question):
        s += sgl.user(f"{question} Which tool helps?")
        s += sgl.assistant("The " + sgl.gen("tool", choices=["calculator", "dictionary"]))
        if s["tool"] == "calculator":
            s += sgl.assistant("I compute " + sgl.gen("next", max_tokens=8))
        else:
            s += sgl.assistant("The word is " + sgl.gen("next", max_tokens=8))

    state = tool("What is two and two?")
    said = {"calculator": "I compute ", "dictionary": "The word is "}[state["tool"]]
    assert said + state["next"] in state.text()


def check_fork() -> None:
    @sgl.function
    def tips(s):
        s += sgl.assistant("Two tips: sleep well, and walk every day.")
        forks = s.fork(2)
        for number, fork in enumerate(forks, 1):
            fork += sgl.assistant(f"Tip {number}: " + sgl.gen("more", max_tokens=12))
        s += sgl.assistant("".join(f"{i}: {f['more']}\n" for i, f in enumerate(forks, 1)))
        s += sgl.assistant("In short: " + sgl.gen("short", max_tokens=8))

    state = tips()
    assert "1: " in state.text() and isinstance(state["short"], str)


def check_regex() -> None:
    pattern = r"((25[0-5]|2[0-4]\d|[01]?\d\d?).){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"

    @sgl.function
    def address(s):
        s += sgl.user("The address of a name server, please.")
        s += sgl.assistant(sgl.gen("address", temperature=0, regex=pattern))

    assert re.fullmatch(pattern, address()["address"])


def check_a_record_by_regex() -> None:
    pattern = (
        r'\{\n  "name": "[\w ]{1,12}",\n  "house": "(red|green)",\n  "alive": (true|false)\n\}'
    )

    @sgl.function
    def record(s):
        s += "A person as JSON:\n" + sgl.gen("record", max_tokens=256, regex=pattern)

    assert re.fullmatch(pattern, record.run(temperature=0.5)["record"])


def check_batch() -> None:
    @sgl.function
    def next_number(s, number):
        s += sgl.user(f"What comes after {number}?")
        s += sgl.assistant(sgl.gen("answer", stop="\n", max_tokens=16))

    arguments = [{"number": number} for number in NUMBERS]
    states = next_number.run_batch(arguments, progress_bar=True)
    assert [number in state.text() for number, state in zip(NUMBERS, states, strict=True)]
    lazily = next_number.run_batch(arguments, num_threads=2, generator_style=True)
    assert all(isinstance(state["answer"], str) for state in lazily)


def check_stream() -> None:
    state = chat.run(stream=True, temperature=0, **ASKED)
    assert "".join(state.text_iter()) == chat.run(temperature=0, **ASKED).text()


def check_stream_of_a_variable() -> None:
    several = False
    for _ in range(5):  # a thread that runs late finds an answer of a few milliseconds whole
        state = chat.run(stream=True, temperature=0, **ASKED)
        pieces = list(state.text_iter("answer_2"))
        assert "".join(pieces) == state["answer_2"]
        several |= len(pieces) > 1
    assert several


def check_asynchronous_stream() -> None:
    async def collect() -> list[tuple[str, dict]]:
        state = chat.run(stream=True, temperature=0, **ASKED)
        pieces = state.text_async_iter("answer_1", return_meta_data=True)
        return [piece async for piece in pieces]

    pieces = asyncio.run(collect())
    assert "".join(text for text, _ in pieces) == chat.run(temperature=0, **ASKED)["answer_1"]
    counts = [meta["completion_tokens"] for _, meta in pieces]
    assert counts == sorted(counts) and counts[-1] <= 24


def check_choices_methods() -> None:
    methods = (
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    )
    for method in methods:

        @sgl.function
        def choose(s, method=method):
            s += sgl.user("Which town lies at the Seine?")
            towns = ["London", "Paris", "Berlin an der Spree"]
            s += sgl.assistant(sgl.gen("town", choices=towns, choices_method=method))

        state = choose()
        assert state["town"] in ("London", "Paris", "Berlin an der Spree")
        numbers = state.get_meta_info("town")["normalized_prompt_logprobs"]
        assert len(numbers) == 3 and all(math.isfinite(number) for number in numbers)


def check_scope_of_a_variable() -> None:
    @sgl.function
    def scoped(s):
        s += "Here: "
        with s.var_scope("line"):
            s += "<" + sgl.gen("inside", max_tokens=4, stop=">") + ">"

    state = scoped.run(temperature=0)
    assert state["line"] == f"<{state['inside']}>"


def check_logprobs() -> None:
    @sgl.function
    def scored(s):
        s += "The colour of the sky is"
        options = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
        s += sgl.gen("colour", max_tokens=4, temperature=0, ignore_eos=True, **options)

    meta = scored.run().get_meta_info("colour")
    chosen = [entry[:2] for entry in meta["output_token_logprobs"]]
    assert chosen == [top[0][:2] for top in meta["output_top_logprobs"]] and len(chosen) == 4


def check_reasoning_apart() -> None:
    @sgl.function
    def think(s):
        s += sgl.user("Which colour has the sky? Think first.")
        s += sgl.assistant(
            sgl.separate_reasoning(sgl.gen("answer", regex=THOUGHT), model_type="qwen3")
        )

    if missing := missing_for_reasoning():
        raise Skip(f"this version's parser imports {missing}, of SGLang's runtime")
    state = think()
    state.sync()
    said = (state["answer"], state.get_var("answer_reasoning_content"))
    assert said == ("The sky is blue.", "It is blue."), said


def missing_for_reasoning() -> str:
    """The package without which the front end's own reasoning parser cannot be imported."""
    moved = sgl.__version__.startswith("0.4.")
    try:
        importlib.import_module(f"sglang.srt{'' if moved else '.parser'}.reasoning_parser")
    except ModuleNotFoundError as error:
        return str(error.name)
    return ""


def check_calls_of_the_backend() -> None:
    url = sgl.global_config.default_backend.base_url
    info = sgl.get_server_info(sgl.RuntimeEndpoint(url))
    assert info["model_path"] and info["version"]
    bound = chat.bind(first="Name a bird.")
    assert isinstance(bound.run(second="And one more.")["answer_2"], str)
    chat.cache()
    sgl.flush_cache()


def main() -> None:
    wire = Wire(runtime_endpoint.http_request, {})
    runtime_endpoint.http_request = wire
    sgl.set_default_backend(sgl.RuntimeEndpoint(sys.argv[1]))
    print("sglang", sgl.__version__)
    run_all(globals())
    print("calls:", dict(wire.calls))


if __name__ == "__main__":
    main()

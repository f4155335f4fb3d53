"""What programs send: options, choices, batches, prefixes."""

from __future__ import annotations

import re
import time

import pytest
from test.kit.fake_backend import FakeBackend

import sps_runtime.lang as sgl
from sps_runtime.lang.chat_templates import get_chat_template, template_of_model
from sps_runtime.lang.sampling import REGEX_FLOAT, REGEX_INT


def sent(backend: FakeBackend, expression: object, **options: object) -> dict:
    """The body of the only call that `expression` makes."""

    @sgl.function
    def program(s):
        s += "a"
        s += expression

    program.run(backend=backend, **options).sync()
    assert len(backend.bodies) == 1
    return backend.bodies[0]


def test_a_call_sends_what_sglang_sends() -> None:
    assert sent(FakeBackend(), sgl.gen("x")) == {
        "text": "a",
        "sampling_params": {
            "max_new_tokens": 128,
            "min_new_tokens": 0,
            "n": 1,
            "stop": [],
            "stop_token_ids": [],
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "ignore_eos": False,
            "skip_special_tokens": True,
        },
    }


def test_a_call_over_its_run_over_the_defaults() -> None:
    expression = sgl.gen(
        "x",
        max_tokens=3,
        stop=["\n", "."],
        top_k=5,
        return_logprob=True,
        top_logprobs_num=2,
        stop_regex="[0-9]",
        json_schema="{}",
    )
    body = sent(FakeBackend(), expression, temperature=0.5, max_new_tokens=9, stop="never")
    sampling = body.pop("sampling_params")
    assert body == {"text": "a", "return_logprob": True, "top_logprobs_num": 2}
    told = {"max_new_tokens": 3, "stop": ["\n", "."], "top_k": 5, "temperature": 0.5}
    told |= {"stop_regex": "[0-9]", "json_schema": "{}", "top_p": 1.0}
    assert {name: sampling[name] for name in told} == told


@pytest.mark.parametrize(
    ("expression", "regex", "stop"),
    [
        (sgl.gen("x", dtype=int, stop=";"), REGEX_INT, [";", " ", "\n"]),
        (sgl.gen_int("x"), REGEX_INT, [" ", "\n"]),
        (sgl.gen("x", dtype="float"), REGEX_FLOAT, [" ", "\n"]),
        (sgl.gen("x", dtype=bool), "(True|False)", []),
        (sgl.gen_string("x", stop="\n"), r"\"[\w\d\s]*\"", ["\n"]),
    ],
)
def test_types_become_regexes(expression: object, regex: str, stop: list[str]) -> None:
    sampling = sent(FakeBackend(), expression)["sampling_params"]
    assert sampling["regex"] == regex and sampling["stop"] == stop and "dtype" not in sampling


def test_a_type_takes_the_place_of_a_regex() -> None:
    with pytest.warns(UserWarning, match="takes the place"):
        sampling = sent(FakeBackend(), sgl.gen("x", dtype=int, regex="a"))["sampling_params"]
    assert sampling["regex"] == REGEX_INT


def test_nonsense_is_refused_early() -> None:
    with pytest.raises(re.error):
        sgl.gen("x", regex="(")
    with pytest.raises(ValueError, match="choices"):
        sgl.select("x", [])
    with pytest.raises(ValueError, match="known: default"):
        get_chat_template("no such")


# ---------------------------------------------------------------------------------------- select


METHODS = [
    sgl.token_length_normalized,
    sgl.greedy_token_selection,
    sgl.unconditional_likelihood_normalized,
]


@pytest.mark.parametrize("method", METHODS)
def test_all_choices_are_scored_in_one_batch(method: sgl.ChoicesSamplingMethod) -> None:
    backend = FakeBackend(unlikely="y")

    @sgl.function
    def program(s):
        s += "Sure?" + sgl.select("x", ["yy", "no", "yyn"], choices_method=method)

    state = program.run(backend=backend)
    info = state.get_meta_info("x")
    scoring = backend.bodies[1]
    assert scoring["text"] == ["Sure?yy", "Sure?no", "Sure?yyn"]
    assert scoring["logprob_start_len"] == len("Sure?") - 2
    assert len(backend.bodies) == 2 + method.requires_unconditional_logprobs
    # the prompt's two last tokens count, as they do in SGLang's front end
    assert info["normalized_prompt_logprobs"] == pytest.approx([-12 / 4, -1.0, -13 / 5])
    if method is not sgl.unconditional_likelihood_normalized:
        assert state["x"] == "no" and state.text() == "Sure?no"
    else:
        assert len(backend.bodies[2]["input_ids"]) == 3
        # only the first token has no logprob of its own: it counts as 0 there
        gains = info["normalized_unconditional_prompt_logprobs"]
        assert gains == pytest.approx([-1 / 4, -1 / 4, -1 / 5])
        assert state["x"] == "yyn"


def test_a_token_that_the_text_ends_with_does_not_count() -> None:
    @sgl.function
    def program(s):
        s += "no, xx" + sgl.select("x", ["yy", "n"])

    state = program.run(backend=FakeBackend(unlikely="y"))
    info = state.get_meta_info("x")
    assert info["normalized_prompt_logprobs"] == pytest.approx([-11 / 3, -1.0])
    assert [token[2] for token in info["input_token_logprobs"][0]] == ["x", "y", "y"]


def test_greedy_choice_prefers_the_better_first_token() -> None:
    scores = [[(-1.0, 1, "a"), (-9.0, 2, "b")], [(-2.0, 3, "c")], [(-1.0, 1, "a")]]
    decision = sgl.greedy_token_selection(
        choices=["ab", "c", "a"],
        normalized_prompt_logprobs=[-5.0, -2.0, -1.0],
        input_token_logprobs=scores,
        output_token_logprobs=[[], [], []],
    )
    assert decision.decision == "a"
    assert decision.meta_info["greedy_logprob_matrix"] == [[-1.0, -9.0], [-2.0, -2.0], [-1.0, -1.0]]


def test_choices_of_gen_and_temperature() -> None:
    @sgl.function
    def program(s, temperature):
        s += "a" + sgl.gen("x", choices=["1", "2"], temperature=temperature)

    assert program.run(0.0, backend=FakeBackend())["x"] == "1"
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="temperature"):
        program.run(1.0, backend=FakeBackend())["x"]


# --------------------------------------------------------------------------------------- batches


@sgl.function
def answer(s, document, question, ending="."):
    s += "Read this: " + document + "\nQ: " + question + ending + sgl.gen("x")


DOCUMENT = "It was a dark and stormy night. " * 4


def test_a_batch_keeps_order_and_caches_what_all_begin_with() -> None:
    backend = FakeBackend()
    runs = [{"document": DOCUMENT, "question": f"q{i}"} for i in range(20)]
    states = answer.run_batch(runs, num_threads=4, backend=backend)
    assert [state["x"] for state in states] == [f"<q{i}.>" for i in range(20)]
    assert backend.bodies[0]["text"] == f"Read this: {DOCUMENT}\nQ: "
    assert len(backend.bodies) == 21 and backend.most_at_once <= 4


def test_forms_of_a_batch() -> None:
    backend = FakeBackend()
    assert answer.run_batch([], backend=backend) == []
    states = answer.bind(document="d").run_batch(
        [{"question": "a"}, {"question": "b"}], backend=backend, generator_style=True
    )
    assert not isinstance(states, list)
    assert [state["x"] for state in states] == ["<a.>", "<b.>"]
    states = answer.run_batch([("d", "a"), ["d", "b", "!"]], backend=backend, temperature=0.5)
    assert [state["x"] for state in states] == ["<a.>", "<b!>"]
    assert backend.bodies[-1]["sampling_params"]["temperature"] == 0.5
    for wrong in (["d"], ["d", "q", "e", "more"], "dq"):
        with pytest.raises(TypeError, match="does not fit"):
            answer.run_batch([wrong], backend=backend)
    with pytest.raises(TypeError, match="no_such"):
        answer.run_batch([("d", "q")], backend=backend, no_such=1)
    with pytest.raises(TypeError, match="no_such"):
        answer.bind(no_such=1)


def test_an_error_in_a_batch_is_raised() -> None:
    @sgl.function
    def wrong(s, n):
        s += "x"
        if n == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wrong.run_batch([{"n": n} for n in range(5)], backend=FakeBackend(), num_threads=2)


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [{"document": "d", "question": "q"}] * 3
    answer.run_batch(runs, backend=FakeBackend(), progress_bar=True)
    shown = capsys.readouterr().err
    assert shown.endswith("] 3/3\n") and "1/3" in shown


def test_generators_yield_before_all_is_done() -> None:
    backend = FakeBackend(lambda text, sampling: time.sleep(0.02 * text.count("slow")) or "x")
    runs = [{"document": "d", "question": "slow" * (i > 0)} for i in range(5)]
    states = answer.run_batch(runs, backend=backend, num_threads=2, generator_style=True)
    next(states)
    assert len(backend.bodies) < 5
    assert len(list(states)) == 4


def test_a_prefix_ends_where_an_argument_is_used() -> None:
    seen = []

    @sgl.function
    def careful(s, mode):
        s += "x" * 100
        s += sgl.user("fixed")
        if mode == "long":
            s += "never seen"
        s += mode + sgl.gen("y")
        seen.append("ran on")

    backend = FakeBackend()
    careful.cache(backend)
    assert [body["text"] for body in backend.bodies] == ["x" * 100 + "USER:fixed\n"]
    assert seen == []
    careful.bind(mode="long").cache(backend)
    assert backend.bodies[-1]["text"] == "x" * 100 + "USER:fixed\nnever seenlong"


# ------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3-instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-chat"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen"),
        ("TinyLlama/TinyLlama-1.1B", "chatml"),
        ("google/gemma-3-1b", "gemma-it"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-Base", "default"),
        ("embedded", "default"),
    ],
)
def test_models_have_templates(model: str, name: str) -> None:
    assert template_of_model(model).name == name


def test_llama_2_folds_the_system_message_into_the_first_user_message() -> None:
    backend = FakeBackend(lambda text, sampling: "hi", model_path="Llama-2-7b-chat")

    @sgl.function
    def program(s):
        s += sgl.system("Be kind.") + sgl.user("A") + sgl.assistant(sgl.gen("x")) + sgl.user("B")

    expected = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nA [/INST]hi </s><s>[INST] B [/INST]"
    assert program.run(backend=backend).text() == expected


def test_templates_agree_with_sglang() -> None:
    theirs = pytest.importorskip("sglang.lang.chat_template")
    from sps_runtime.lang.chat_templates import TEMPLATES

    history: list[dict[str, str]] = []
    for name, ours in TEMPLATES.items():
        other = theirs.get_chat_template(name)
        assert ours.default_system == other.default_system_prompt
        assert ours.stop == tuple(other.stop_str)
        for role in ("system", "user", "assistant", "user"):
            assert ours.affixes(role, history) == other.get_prefix_and_suffix(role, history)
            history.append({"role": role, "content": "x"})
        history.clear()

"""Control flow of programs: variables, branches, joins, roles, errors."""

from __future__ import annotations

import threading
import time

import pytest
from test.kit.fake_backend import FakeBackend

import sps_runtime.lang as sgl

pytestmark = pytest.mark.filterwarnings("ignore:a program has stopped")


def failing(text: str, sampling: dict) -> str:
    if text.endswith("bad"):
        raise RuntimeError("the model is gone")
    return "<ok>"


def texts(backend: FakeBackend) -> list[str]:
    return [body["text"] for body in backend.bodies]


def test_text_and_variables_come_in_order() -> None:
    @sgl.function
    def program(s, name):
        s += "I am " + name
        s += " and" + sgl.gen("first") + " then " + sgl.gen("second")
        s += "!"
        return "returned"

    backend = FakeBackend()
    state = program.run("Ada", backend=backend)
    assert state.ret_value == "returned"
    assert (state["first"], state["second"]) == ("<and>", "<then>")
    assert state.text() == "I am Ada and<and> then <then>!"
    assert texts(backend) == ["I am Ada and", "I am Ada and<and> then "]
    assert "first" in state and "third" not in state
    assert state.get_meta_info("first")["prompt_tokens"] == len("I am Ada and")


def test_appending_does_not_wait_and_reading_does() -> None:
    backend = FakeBackend()
    backend.gate.clear()

    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x")

    state = program.run(backend=backend)
    assert "x" not in state
    with pytest.raises(TimeoutError):
        state.get_meta_info("x", timeout=0.01)
    backend.gate.set()
    assert state["x"] == "<a>"


def test_a_variable_made_again_is_waited_for_again() -> None:
    @sgl.function
    def program(s):
        seen = []
        for word in ("a", "b", "c"):
            s += " " + word + sgl.gen("x")
            seen.append(s["x"])
        return seen

    assert program.run(backend=FakeBackend()).ret_value == ["<a>", "<b>", "<c>"]


def test_variables_that_programs_set_and_scopes() -> None:
    @sgl.function
    def program(s):
        s["mine"] = 5
        with s.var_scope("whole"):
            s += "a" + sgl.gen() + "b"
        s += "c"

    state = program.run(backend=FakeBackend())
    assert state["mine"] == 5 and state["whole"] == "a<a>b"
    assert state.get_meta_info("mine") is None
    with pytest.raises(KeyError):
        state["nothing"]


def test_branches_share_a_prefix_and_run_side_by_side() -> None:
    backend = FakeBackend()

    @sgl.function
    def program(s):
        s += "start" + sgl.gen("before")
        forks = s.fork(3)
        forks += lambda i: f" way{i}"
        for fork in forks:
            assert fork["before"] == "<start>"
        backend.gate.clear()
        forks += sgl.gen("end")
        until(lambda: backend.most_at_once == 3)
        backend.gate.set()
        forks.join()
        s += ":" + "".join(s["end"]) + forks[1]["end"]

    state = program.run(backend=backend)
    assert state.text() == "start<start>:<start<start>"[:13] + "<way0><way1><way2><way1>"
    assert backend.bodies[1]["sampling_params"] == {"max_new_tokens": 0}
    assert texts(backend)[1] == "start<start>"
    assert state["end"] == ["<way0>", "<way1>", "<way2>"] and state["before"] == "<start>"


def until(happened, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_ways_to_append_to_branches() -> None:
    @sgl.function
    def program(s):
        s += "."
        forks = s.fork(2)
        forks += [" a", " b"]
        forks += " c"
        forks[0] += " d"
        forks += sgl.gen("x") + ","
        assert len(forks) == 2
        forks.join("concate_and_append")
        s += "end"

    assert program.run(backend=FakeBackend()).text() == ". a c d<d>, b c<c>,end"


def test_a_copy_gives_back_variables_and_no_text() -> None:
    @sgl.function
    def program(s):
        s += "a"
        with s.copy() as aside:
            aside += " b" + sgl.gen("thought")
        s += " c"

    state = program.run(backend=FakeBackend())
    assert state.text() == "a c" and state["thought"] == ["<b>"]


def test_an_unknown_join_is_refused() -> None:
    @sgl.function
    def program(s):
        s.fork(2).join("no such")

    with pytest.raises(ValueError, match="no such"):
        program.run(backend=FakeBackend())


def test_roles_make_text_and_messages() -> None:
    backend = FakeBackend(lambda text, sampling: "hi", model_path="Qwen/Qwen2.5-0.5B-Instruct")

    @sgl.function
    def program(s):
        s += sgl.user("A" + "B")
        s += sgl.assistant(sgl.gen("x", stop="!"))
        with s.user():
            s += " C"
        s.assistant("D")
        s += sgl.user_begin() + "E" + sgl.user_end()

    state = program.run(backend=backend)
    assert state.messages() == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "AB"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": "D"},
        {"role": "user", "content": "E"},
    ]
    assert state.text().startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert backend.bodies[0]["sampling_params"]["stop"] == ["!", "<|im_end|>"]


def test_the_first_error_ends_a_program_and_nobody_waits_forever() -> None:
    @sgl.function
    def program(s):
        s += "good" + sgl.gen("one") + "bad" + sgl.gen("two") + "more"
        s.sync()
        s += "later" + sgl.gen("three")

    state = program.run(backend=FakeBackend(failing))
    assert state["one"] == "<ok>"
    for name in ("two", "three"):
        with pytest.raises(RuntimeError, match="the model is gone"):
            state[name]
    assert state.text() == "good<ok>bad" and str(state.error()) == "the model is gone"


def test_a_program_that_has_stopped_warns() -> None:
    @sgl.function
    def program(s):
        s += "bad" + sgl.gen("x")

    with pytest.warns(RuntimeWarning, match="the model is gone"):
        program.run(backend=FakeBackend(failing)).sync()


@pytest.mark.parametrize("mode", ["gather_variable", "concate_and_append"])
def test_a_branch_that_failed_fails_the_join(mode: str) -> None:
    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += ["fine", "bad"]
        forks += sgl.gen("x")
        forks.join(mode)

    with pytest.raises(RuntimeError, match="the model is gone"):
        program.run(backend=FakeBackend(failing))


def test_what_cannot_be_appended() -> None:
    @sgl.function
    def program(s, what):
        s += what

    with pytest.raises(ValueError):
        program.run(None, backend=FakeBackend())
    with pytest.raises(TypeError, match="int"):
        program.run(5, backend=FakeBackend())
    with pytest.raises(TypeError, match="float"):
        program.run(sgl.gen("x") + 1.5, backend=FakeBackend())  # type: ignore[operator]


def test_roles_do_not_nest() -> None:
    @sgl.function
    def program(s):
        s += sgl.user(sgl.assistant("x"))

    error = program.run(backend=FakeBackend()).error()
    assert isinstance(error, ValueError) and "inside of role user" in str(error)


def test_threads_live_only_while_the_model_is_asked() -> None:
    before = threading.active_count()
    backend = FakeBackend()

    @sgl.function
    def program(s):
        s += "a"
        forks = s.fork(5)  # the prefill is a call
        assert threading.active_count() == before
        backend.gate.clear()
        forks += sgl.gen("x")
        assert threading.active_count() == before + 5
        backend.gate.set()

    program.run(backend=backend)
    until(lambda: threading.active_count() == before)


def test_without_threads_calls_run_where_they_are_appended() -> None:
    seen = []

    def answer(text: str, sampling: dict) -> str:
        seen.append(threading.current_thread())
        return "x"

    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x")

    assert program.run(backend=FakeBackend(answer), use_thread=False)["x"] == "x"
    assert seen == [threading.current_thread()]


def test_reasoning_is_taken_out() -> None:
    @sgl.function
    def program(s):
        s += sgl.user("Q")
        generated = sgl.separate_reasoning(sgl.gen("x"), model_type="qwen3")
        s += sgl.assistant(generated)

    backend = FakeBackend(lambda text, sampling: "<think>hm</think>42")
    state = program.run(backend=backend)
    assert (state["x"], state["x_reasoning_content"]) == ("42", "hm")
    assert state.messages()[-1]["content"] == "42"


def test_images_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="images are not served"):
        sgl.image("x.png")


def test_a_backend_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl.global_config, "default_backend", None)

    @sgl.function
    def program(s):
        s += "x"

    with pytest.raises(ValueError, match="set_default_backend"):
        program.run()
    with pytest.raises(ValueError, match="str is no backend"):
        program.run(backend="http://x")
    sgl.set_default_backend(FakeBackend())
    assert program.run().text() == "x"
    assert sgl.get_server_info() == {"version": "fake"}

"""Streams of programs: text, variables, their end, by threads and by event loops."""

from __future__ import annotations

import asyncio
import threading

import pytest
from test.kit.fake_backend import FakeBackend

import sps_runtime.lang as sgl

pytestmark = pytest.mark.filterwarnings("ignore:a program has stopped")


@sgl.function
def program(s):
    s += "a" + sgl.gen("x")
    s += " b" + sgl.gen("y") + sgl.select("z", ["1", "2"]) + "."


def test_text_comes_in_pieces_and_completely() -> None:
    state = program.run(stream=True, backend=FakeBackend())
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text() == "a<a> b<b>1."
    assert "" not in pieces


@pytest.mark.parametrize(("name", "whole"), [("x", "<a>"), ("y", "<b>"), ("z", "1")])
def test_variables_come_in_pieces(name: str, whole: str) -> None:
    state = program.run(stream=True, backend=FakeBackend())
    assert "".join(state.text_iter(name)) == whole == state[name]


@pytest.mark.parametrize("name", [None, "x"])
def test_pieces_come_before_the_end(name: str | None) -> None:
    backend = FakeBackend(lambda text, sampling: "long answer")
    backend.pace = threading.Semaphore(1)
    pieces = program.run(stream=True, backend=backend).text_iter(name)
    began = ""
    while not began.endswith("l"):
        began += next(pieces)
    backend.pace.release()
    assert next(pieces) == "o"
    backend.pace.release(100)
    assert "".join(pieces).startswith("ng answer")


def test_a_variable_that_never_comes_ends_empty() -> None:
    state = program.run(stream=True, backend=FakeBackend())
    assert list(state.text_iter("nothing")) == []


def test_reading_waits_for_a_stream_that_has_hardly_begun() -> None:
    backend = FakeBackend()
    backend.gate.clear()
    state = program.run(stream=True, backend=backend)
    backend.gate.set()
    assert state["y"] == "<b>" and state.text() == "a<a> b<b>1."
    with pytest.raises(KeyError):
        state["nothing"]


def test_a_run_that_is_no_stream_comes_whole() -> None:
    state = program.run(backend=FakeBackend())
    assert list(state.text_iter()) == ["a<a> b<b>1."]
    assert list(state.text_iter("x")) == ["<a>"]
    assert asyncio.run(collect(state, "x")) == ["<a>"]


async def collect(state: sgl.ProgramState, *args: object) -> list:
    return [piece async for piece in state.text_async_iter(*args)]


def test_event_loops_read_streams() -> None:
    async def both() -> tuple[list, list]:
        backend = FakeBackend()
        states = [program.run(stream=True, backend=backend) for _ in range(2)]
        text, variable = await asyncio.gather(collect(states[0]), collect(states[1], "y", True))
        return text, variable

    text, variable = asyncio.run(both())
    assert "".join(text) == "a<a> b<b>1."
    assert "".join(piece for piece, _ in variable) == "<b>"
    assert variable[-1][1] == {"completion_tokens": 3}


def test_an_abandoned_stream_harms_nobody() -> None:
    async def first() -> str:
        state = program.run(stream=True, backend=FakeBackend())
        async for piece in state.text_async_iter():
            return piece
        raise AssertionError("nothing came")

    assert asyncio.run(first()).startswith("a")


def broken(text: str, sampling: dict) -> str:
    if text.endswith("b"):
        raise RuntimeError("the model is gone")
    return "<a>"


def test_errors_come_after_what_was_written() -> None:
    state = program.run(stream=True, backend=FakeBackend(broken))
    received = []
    with pytest.raises(RuntimeError, match="the model is gone"):
        for piece in state.text_iter():
            received.append(piece)
    assert "".join(received) == "a<a> b"
    assert "".join(state.text_iter("x")) == "<a>"
    with pytest.raises(RuntimeError, match="the model is gone"):
        list(state.text_iter("y"))
    with pytest.raises(RuntimeError, match="the model is gone"):
        asyncio.run(collect(state))


def test_an_error_of_the_program_itself_ends_its_stream() -> None:
    @sgl.function
    def wrong(s):
        s += "a" + sgl.gen("x")
        raise ZeroDivisionError

    state = wrong.run(stream=True, backend=FakeBackend())
    with pytest.raises(ZeroDivisionError):
        list(state.text_iter())
    assert isinstance(state.error(), ZeroDivisionError)


def test_branches_of_a_stream() -> None:
    @sgl.function
    def forking(s):
        s += "a"
        forks = s.fork(2)
        forks += [" b", " c"]
        forks += sgl.gen("x")
        forks.join()
        s += "".join(s["x"])

    state = forking.run(stream=True, backend=FakeBackend())
    assert "".join(state.text_iter()) == "a<b><c>"


def test_several_answers_are_no_stream() -> None:
    @sgl.function
    def several(s):
        s += "a" + sgl.gen("x", n=2)

    state = several.run(backend=FakeBackend())
    assert state["x"] == ["<a>", "<a>"] and state.text() == "a<a>"
    state = several.run(stream=True, backend=FakeBackend())
    with pytest.raises(ValueError, match="n > 1"):
        list(state.text_iter())

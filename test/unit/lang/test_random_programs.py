"""Random programs: the same text and variables with and without threads, in streams, by SGLang."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from test.kit.fake_backend import FakeBackend

import sps_runtime.lang as ours

SEEDS = range(40)
ROLES = ("system", "user", "assistant")
NAMES = ("a", "b", "c")
Act = Callable[[ModuleType, Any], Any]


def random_program(seed: int) -> Act:
    """A program whose every choice is made by `seed`, over whichever front end it is given."""

    def program(sgl: ModuleType, s: Any) -> list[Any]:
        choose = random.Random(seed)
        read: list[Any] = []
        for _ in range(choose.randint(1, 5)):
            s += f"begin{choose.randint(0, 9)}"
            choose.choice(STATEMENTS)(choose, sgl, s, read)
        s += sgl.gen("last")
        return [*read, s["last"], s.text(), s.messages()]

    return program


def expression(choose: random.Random, sgl: ModuleType, name: str) -> Any:
    generated = sgl.gen(name, stop="never", temperature=choose.choice([0, 0.5, None]))
    selected = sgl.select(name, ["one", "two", "three"])
    return choose.choice([generated, "x " + generated, generated + " y", selected, "z" + selected])


def some_text(choose: random.Random, sgl: ModuleType, s: Any, read: list[Any]) -> None:
    name = choose.choice(NAMES)
    s += expression(choose, sgl, name)
    if choose.random() < 0.5:
        read.append((name, s[name], name in s))


def a_conversation(choose: random.Random, sgl: ModuleType, s: Any, read: list[Any]) -> None:
    for _ in range(choose.randint(1, 3)):
        role = choose.choice(ROLES)
        content = choose.choice([" plain", expression(choose, sgl, choose.choice(NAMES))])
        way = choose.randint(0, 3)
        if way == 0:
            s += getattr(sgl, role)(content)
        elif way == 1:
            getattr(s, role)(content)
        elif way == 2:
            with getattr(s, role)():
                s += content
        else:
            s += getattr(sgl, f"{role}_begin")() + content
            s += getattr(sgl, f"{role}_end")()


def a_scope(choose: random.Random, sgl: ModuleType, s: Any, read: list[Any]) -> None:
    with s.var_scope("scope"):
        s += expression(choose, sgl, choose.choice(NAMES)) + "end"
    read.append(s["scope"])


def branches(choose: random.Random, sgl: ModuleType, s: Any, read: list[Any]) -> None:
    forks = s.fork(choose.randint(1, 3))
    count = len(forks.states)
    forks += choose.choice([lambda i: f" way{i}", [f" w{i}" for i in range(count)]])
    shared = f"made{choose.randint(0, 999)}"
    forks += expression(choose, sgl, shared)
    if choose.random() < 0.3:
        inner = forks[0].fork(2)
        inner += sgl.gen("inner")
        inner.join("concate_and_append")
    mode = choose.choice(["gather_variable", "concate_and_append"])
    forks.join(mode)
    read.append([forks[i][shared] for i in range(count)])
    if mode == "gather_variable":
        read.append(s[shared])


def a_copy(choose: random.Random, sgl: ModuleType, s: Any, read: list[Any]) -> None:
    name = f"aside{choose.randint(0, 999)}"
    with s.copy() as aside:
        aside += " aside" + sgl.gen(name)
    read.append(s[name])


STATEMENTS = (some_text, some_text, a_conversation, a_scope, branches, a_copy)


def by_ours(seed: int, **options: Any) -> list[Any]:
    program = random_program(seed)
    state = ours.function(lambda s: program(ours, s)).run(backend=FakeBackend(), **options)
    if options.get("stream"):
        assert "".join(state.text_iter()) == state.text()
    assert state.error() is None
    result: list[Any] = state.ret_value
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_and_streams_change_nothing(seed: int) -> None:
    expected = by_ours(seed, use_thread=False)
    assert by_ours(seed) == expected
    assert by_ours(seed, stream=True) == expected


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_makes_the_same_of_it(seed: int) -> None:
    import sglang
    from sglang.lang.backend.base_backend import BaseBackend

    model = FakeBackend()

    class Adapter(BaseBackend):
        def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
            sampling = {"temperature": sampling_params.temperature}
            answer = model.ask({"text": s.text_, "sampling_params": sampling})
            return answer["text"], answer["meta_info"]

        def select(self, s: Any, choices: list[str], temperature: float, method: Any) -> Any:
            return model.select(s.text_, choices, temperature, ours.token_length_normalized)

    program = random_program(seed)
    state = sglang.function(lambda s: program(sglang, s)).run(backend=Adapter())
    assert state.ret_value == by_ours(seed)

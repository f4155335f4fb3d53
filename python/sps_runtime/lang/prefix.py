"""The text that all runs of a program begin with, found by running it without a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from sps_runtime.lang.backend import Backend
from sps_runtime.lang.branch import Branch, Stopped
from sps_runtime.lang.expressions import Expression, Prefill, Step
from sps_runtime.lang.sampling import DEFAULTS
from sps_runtime.lang.state import ProgramState

_WORTH_CACHING = 64  # characters


class Unknown(Expression):
    """An argument that differs from run to run; the prefix ends where it is used."""

    def steps(self) -> Iterator[Step]:
        yield Prefill()  # there is no model to ask

    def _stop(self, *_: object) -> NoReturn:
        raise Stopped

    __str__ = __format__ = __bool__ = __int__ = __float__ = __len__ = __iter__ = _stop
    __getitem__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __call__ = _stop
    __hash__ = Expression.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        raise Stopped


class _NoModel(Backend):
    """Has a model's chat template; whoever asks it has come to the end of the prefix."""

    def __init__(self, model: Backend) -> None:
        super().__init__(model.model_path)
        self.chat_template = model.chat_template

    def ask(self, body: dict[str, Any]) -> NoReturn:
        raise Stopped

    def events(self, body: dict[str, Any]) -> NoReturn:
        raise Stopped

    def flush_cache(self) -> NoReturn:
        raise Stopped

    def get_server_info(self) -> NoReturn:
        raise Stopped


def common(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that are the same in all runs."""
    first = runs[0]
    same = (name for name in first if all(name in run and run[name] is first[name] for run in runs))
    return {name: first[name] for name in same}


def find(
    func: Callable[..., Any], names: Sequence[str], known: Mapping[str, Any], model: Backend
) -> str:
    """What `func` appends before it asks a model or uses an argument that is not `known`."""
    branch = Branch(_NoModel(model), DEFAULTS, threaded=False)
    unknown = {name: Unknown() for name in names if name not in known}
    with contextlib.suppress(Exception):  # whatever such arguments lead to, it is the end
        func(ProgramState(branch), **{**unknown, **known})
    return branch.text


def cache(
    func: Callable[..., Any], names: Sequence[str], known: Mapping[str, Any], model: Backend
) -> None:
    """Have that text computed, if it is long enough to be worth a call."""
    text = find(func, names, known, model)
    if len(text) > _WORTH_CACHING:
        model.cache_prefix(text)

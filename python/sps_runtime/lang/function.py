"""Programs: functions of a state, and the ways to run them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from sps_runtime.lang import batch, prefix
from sps_runtime.lang.branch import Branch
from sps_runtime.lang.sampling import DEFAULTS, RUN_OPTIONS, Sampling
from sps_runtime.lang.settings import global_config
from sps_runtime.lang.state import ProgramState

Arguments = Mapping[str, Any]


class Function:
    """A program, made by `function`.

    Args:
        func: takes the state first, then the program's own arguments.
        bound: arguments that are given already.
    """

    def __init__(self, func: Callable[..., Any], bound: Arguments | None = None) -> None:
        parameters = list(inspect.signature(func).parameters.values())
        if not parameters:
            raise TypeError("a program takes a state as its first argument")
        self.func = func
        self.bound = dict(bound or {})
        self.arg_names = [parameter.name for parameter in parameters[1:]]
        self._required = sum(p.default is inspect.Parameter.empty for p in parameters[1:])

    def bind(self, **arguments: Any) -> Function:
        """The same program with some arguments given. Raises TypeError for unknown ones."""
        unknown = set(arguments) - set(self.arg_names)
        if unknown:
            raise TypeError(f"{self.func.__name__} has no argument {min(unknown)}")
        return Function(self.func, {**self.bound, **arguments})

    def run(
        self,
        *args: Any,
        stream: bool = False,
        backend: Any = None,
        use_thread: bool = True,
        **options: Any,
    ) -> ProgramState:
        """Run the program; return when its function has, while the model may still write.

        Args:
            args: of the program.
            stream: return at once, for `ProgramState.text_iter`.
            backend: instead of the default one.
            use_thread: False to run calls one by one in this thread.
            options: the program's arguments, and how its calls sample: max_new_tokens (128), n,
                stop, stop_token_ids, temperature (1.0), top_p, top_k, min_p, frequency_penalty,
                presence_penalty, ignore_eos, return_logprob, logprob_start_len,
                top_logprobs_num, return_text_in_logprobs.

        Raises:
            Exception: what the function raises. What the model's calls raise comes when their
                variables are read.
        """
        sampling, arguments = _split(options)
        branch = Branch(
            global_config.backend(backend), sampling, stream=stream, threaded=use_thread
        )
        state = ProgramState(branch)
        arguments = {**arguments, **self.bound}
        if not stream:
            state.ret_value = self.func(state, *args, **arguments)
            return state
        branch.expect_author()
        work = (state, args, arguments)
        threading.Thread(target=self._write, args=work, daemon=True).start()
        return state

    __call__ = run

    def run_batch(
        self,
        batch_kwargs: Sequence[Arguments | Sequence[Any]],
        *,
        backend: Any = None,
        num_threads: str | int = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **options: Any,
    ) -> list[ProgramState] | Iterator[ProgramState]:
        """Run the program once for each set of arguments, side by side.

        Args:
            batch_kwargs: dicts, or lists of positional arguments.
            num_threads: how many run at once; ``auto`` is at least 96.
            progress_bar: show one on stderr.
            generator_style: return an iterator, which yields states in order as they finish.
            options: how calls sample, as in `run`.

        Raises:
            TypeError: for arguments that do not fit the program.
        """
        sampling, unknown = _split(options)
        if unknown:
            raise TypeError(f"run_batch has no option {min(unknown)}")
        chosen = global_config.backend(backend)
        runs = [{**self._named(given), **self.bound} for given in batch_kwargs]
        if global_config.enable_precache_with_tracing and len(runs) > 1:
            prefix.cache(self.func, self.arg_names, prefix.common(runs), chosen)

        def run_one(arguments: Arguments) -> ProgramState:
            state = ProgramState(Branch(chosen, sampling))
            state.ret_value = self.func(state, **arguments)
            state.sync()
            return state

        finished = batch.run(run_one, runs, num_threads, progress_bar)
        return finished if generator_style else list(finished)

    def cache(self, backend: Any = None) -> None:
        """Have the text that every run begins with computed and kept."""
        prefix.cache(self.func, self.arg_names, self.bound, global_config.backend(backend))

    def _named(self, given: Arguments | Sequence[Any]) -> Arguments:
        if isinstance(given, Mapping):
            return given
        if isinstance(given, str) or not self._required <= len(given) <= len(self.arg_names):
            raise TypeError(f"{given!r} does not fit the arguments {self.arg_names}")
        return dict(zip(self.arg_names, given, strict=False))

    def _write(self, state: ProgramState, args: tuple[Any, ...], arguments: Arguments) -> None:
        """Run the function of a stream: its error is the stream's."""
        with state.branch.written_by_this_thread():
            try:
                state.ret_value = self.func(state, *args, **arguments)
            except Exception as error:
                state.branch.fail(error)


@overload
def function(func: Callable[..., Any]) -> Function: ...


@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], Function]: ...


def function(
    func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None
) -> Function | Callable[[Callable[..., Any]], Function]:
    """Make a program of a function of a state ``s``: a decorator, with or without arguments.

    `num_api_spec_tokens` is accepted and has no effect: it saves calls of APIs that charge for
    each, and changes nothing about what a program may rely on.
    """
    return Function if func is None else Function(func)


def _split(options: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """What says how to sample, over the defaults; and the rest."""
    told = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in RUN_OPTIONS}
    return Sampling(**told).over(DEFAULTS), rest

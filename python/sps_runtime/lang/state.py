"""What a program holds as ``s``: a branch to append to and to read from, and groups of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from sps_runtime.lang.branch import Branch
from sps_runtime.lang.expressions import (
    AppendBranches,
    Expression,
    Prefill,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    as_expression,
)
from sps_runtime.lang.words import role


class ProgramState:
    """The state of a running program: ``s += ...`` appends, ``s["name"]`` reads a variable.

    Reading waits for what was appended before; appending never waits for the model.

    Attributes:
        ret_value: what the program's function returned.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.ret_value: Any = None

    # ------------------------------------------------------------------------------- appending

    def __iadd__(self, other: Expression | str) -> ProgramState:
        if other is None:
            raise ValueError("None cannot be appended")
        self.branch.submit(as_expression(other))
        return self

    def system(self, expression: Expression | str | None = None) -> Any:
        """Append a system message, or use as ``with s.system(): s += ...``."""
        return self._role("system", expression)

    def user(self, expression: Expression | str | None = None) -> Any:
        return self._role("user", expression)

    def assistant(self, expression: Expression | str | None = None) -> Any:
        return self._role("assistant", expression)

    @contextlib.contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """What the block appends becomes the variable `name`."""
        self.branch.submit(ScopeBegin(name))
        yield
        self.branch.submit(ScopeEnd(name))

    def set_var(self, name: str, value: Any) -> None:
        with self.branch.changing():
            self.branch.variables[name] = value

    __setitem__ = set_var

    # --------------------------------------------------------------------------------- forking

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> ForkedStates:
        """`size` copies that go on from here side by side; the text so far is computed once.

        `position_ids_offset` is accepted and has no effect, as in SGLang.
        """
        if size > 1 and self.text():
            self.branch.submit(Prefill())
        self.sync()
        if self.branch.error is not None:
            raise self.branch.error
        return ForkedStates([ProgramState(self.branch.fork()) for _ in range(size)], self)

    @contextlib.contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator[ProgramState]:
        """One copy for the block; what it adds to the variables comes back, its text does not."""
        forks = self.fork(1)
        try:
            yield forks[0]
        finally:
            forks.join()

    # --------------------------------------------------------------------------------- reading

    def text(self) -> str:
        """All of the text, when it has been written."""
        self.sync()
        return self.branch.text

    def messages(self) -> list[dict[str, str]]:
        """The messages that roles made, as the OpenAI API has them."""
        self.sync()
        return self.branch.messages

    def sync(self) -> None:
        """Wait for all that was appended."""
        self.branch.sync()

    def error(self) -> Exception | None:
        """What ended the program early, if anything did."""
        self.sync()
        return self.branch.error

    def get_var(self, name: str) -> Any:
        return self.branch.get(name)

    __getitem__ = get_var

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        """What the server said about the variable `name`: tokens, cached_tokens, logprobs, ..."""
        return self.branch.get_meta_info(name, timeout)

    def __contains__(self, name: str) -> bool:
        return name in self.branch.variables

    # ------------------------------------------------------------------------------- streaming

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text, or a variable, in pieces as they come; whole if the run is no stream.

        Raises:
            Exception: what ended the program early, after what came before it.
        """
        if not self.branch.stream:
            yield self.text() if var_name is None else self.get_var(var_name)
            return
        seen, last = 0, False
        while not last:
            piece, last = self.branch.wait_look(var_name, seen)
            seen += len(piece)
            if piece:
                yield piece
        self._raise_at_end(var_name)

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[Any]:
        """`text_iter` for an event loop.

        With `return_meta_data` it yields a variable's pieces with the meta_info so far.
        """
        if not self.branch.stream:
            reader = self.text if var_name is None else lambda: self.get_var(var_name)
            yield await asyncio.to_thread(reader)
            return
        async for piece in self._pieces(var_name):
            if return_meta_data and var_name is not None:
                yield piece, self.branch.meta_info.get(var_name)
            else:
                yield piece
        self._raise_at_end(var_name)

    async def _pieces(self, name: str | None) -> AsyncIterator[str]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before its iterator
                loop.call_soon_threadsafe(woken.set)

        seen, last = 0, False
        with self.branch.listening(wake):
            while not last:
                woken.clear()
                found = self.branch.look(name, seen)
                if found is None:
                    await woken.wait()
                    continue
                piece, last = found
                seen += len(piece)
                if piece:
                    yield piece

    def _raise_at_end(self, name: str | None) -> None:
        """Raise what kept the text, or the variable, from its end."""
        if name is None and self.branch.error is not None:
            raise self.branch.error
        if name is not None and self.branch.error is not None:
            self.branch.get(name)

    def _role(self, name: str, expression: Expression | str | None) -> Any:
        if expression is None:
            return self._role_scope(name)
        whole = role(name, expression)
        self.branch.submit(whole)
        return whole

    @contextlib.contextmanager
    def _role_scope(self, name: str) -> Iterator[None]:
        self.branch.submit(RoleBegin(name))
        yield
        self.branch.submit(RoleEnd(name))

    def __repr__(self) -> str:
        return f"ProgramState({self.text()!r})"


class ForkedStates:
    """Branches of one program that run side by side."""

    def __init__(self, states: list[ProgramState], source: ProgramState) -> None:
        self.states = states
        self._source = source

    def join(self, mode: str = "gather_variable") -> None:
        """Wait for all branches and bring what they made back.

        Args:
            mode: ``gather_variable``: each variable that branches added becomes a list of their
                values; ``concate_and_append``: what they wrote is appended, in order.

        Raises:
            ValueError: for another mode.
            Exception: what ended a branch early.
        """
        if mode == "gather_variable":
            self._gather()
        elif mode == "concate_and_append":
            branches = tuple(state.branch for state in self.states)
            self._source.branch.submit(AppendBranches(branches))
            self._source.sync()
            if self._source.branch.error is not None:
                raise self._source.branch.error
        else:
            raise ValueError(f"unknown mode of join: {mode!r}")

    def _gather(self) -> None:
        variables = self._source.branch.variables
        known = set(variables)
        for state in self.states:
            error = state.error()
            if error is not None:
                raise error
            for name, value in state.branch.variables.items():
                if name not in known:
                    variables.setdefault(name, []).append(value)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        if self.states[index] is not state:  # forks[i] += ... assigns what it was
            raise ValueError("branches cannot be exchanged")

    def __iadd__(
        self,
        other: Expression | str | Callable[[int], Any] | Sequence[Any],
    ) -> ForkedStates:
        """Append to all branches: the same, `other(i)` to branch i, or `other[i]`."""
        for index, state in enumerate(self.states):
            if isinstance(other, Expression | str):
                state += other
            elif callable(other):
                state += other(index)
            else:
                state += other[index]
        return self

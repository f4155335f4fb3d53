"""One text being written: steps in order, at most one at a time, by a thread only when needed."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from sps_runtime.lang import execute
from sps_runtime.lang.backend import Backend
from sps_runtime.lang.expressions import Expression, Step
from sps_runtime.lang.sampling import Sampling


class Stopped(Exception):
    """Ends a branch on purpose, without a warning."""


class Branch:
    """A `Draft`, and the steps of it that still have to run.

    Steps that only write run at once, in the thread that appends them; a step that asks the
    model, and all behind it, run in a thread of their own that ends with the last of them. So
    branches proceed side by side, and there are as many threads as calls under way. The first
    error ends a branch: what is appended later is dropped, and whoever waits for a variable that
    cannot come any more gets the error.

    Args:
        backend: the model.
        sampling: options of every generation that does not say otherwise.
        stream: whether generated text becomes visible piece by piece.
        threaded: False to run everything in the thread that appends.
    """

    def __init__(
        self, backend: Backend, sampling: Sampling, *, stream: bool = False, threaded: bool = True
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.stream = stream
        self.text = ""
        self.messages: list[dict[str, str]] = []
        self.role: str | None = None
        self.role_start = 0
        self.fork_start = 0
        self.variables: dict[str, Any] = {}
        self.meta_info: dict[str, Any] = {}
        self.scopes: dict[str, int] = {}
        self.error: Exception | None = None
        self._threaded = threaded
        self._changed = threading.Condition()
        self._steps: deque[Step] = deque()
        self._running = False
        self._promised: Counter[str] = Counter()
        self._author: int | None = None
        self._open = False
        self._listeners: list[Callable[[], None]] = []

    # ------------------------------------------------------------------------------- appending

    def submit(self, expression: Expression) -> None:
        """Append `expression`; return before it has run if it asks the model."""
        steps = list(expression.steps())
        with self._changed:
            for step in steps:
                self._promised.update(step.promises())
            if self.error is not None:
                return
            self._steps.extend(steps)
            if self._running:
                return
            self._running = True
        self._run(hand_over=self._threaded)

    def write(self, text: str) -> None:
        """Append text, from inside of a step."""
        with self.changing():
            self.text += text

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change what others may be waiting for."""
        with self._changed:
            yield
            self._notify()

    def fork(self) -> Branch:
        """A branch that goes on from here; call it when nothing runs."""
        child = Branch(self.backend, self.sampling, stream=self.stream, threaded=self._threaded)
        child.text = self.text
        child.messages = list(self.messages)
        child.role, child.role_start = self.role, self.role_start
        child.fork_start = len(self.text)
        child.variables = dict(self.variables)
        child.meta_info = dict(self.meta_info)
        return child

    def fail(self, error: Exception) -> None:
        """End the branch: nothing of what waits will run."""
        if not isinstance(error, Stopped):
            warnings.warn(f"a program has stopped: {error!r}", RuntimeWarning, stacklevel=2)
        with self.changing():
            self.error = self.error or error
            self._steps.clear()
            self._running = False

    # --------------------------------------------------------------------------------- reading

    def sync(self) -> None:
        """Wait until all that was appended has run, or failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running and (self._complete or self._mine))

    def get(self, name: str, timeout_s: float | None = None) -> Any:
        """The variable `name`, as soon as it is there.

        Raises:
            KeyError: nothing has been appended that makes it.
            TimeoutError: not in time.
            Exception: what ended the branch before.
        """
        self._wait_for(name, timeout_s)
        return self.variables[name]

    def get_meta_info(self, name: str, timeout_s: float | None = None) -> Any:
        """The meta_info of the variable `name`, None for one that the model did not make."""
        self._wait_for(name, timeout_s)
        return self.meta_info.get(name)

    @property
    def finished(self) -> bool:
        """Whether the text will not change any more, unless somebody appends."""
        return not self._running and (self._complete or self.error is not None)

    def look(self, name: str | None, seen: int) -> tuple[str, bool] | None:
        """What has come after the first `seen` characters of a variable, or of the text.

        Returns:
            the new piece and whether it is the last; None when there is nothing new.
        """
        with self._changed:
            value = self.text if name is None else str(self.variables.get(name, ""))
            settled = name is not None and name in self.variables and not self._promised[name]
            piece, last = value[seen:], settled or self.finished
            return (piece, last) if piece or last else None

    def wait_look(self, name: str | None, seen: int) -> tuple[str, bool]:
        """`look`, as soon as there is something."""
        with self._changed:
            self._changed.wait_for(lambda: self.look(name, seen) is not None)
            found = self.look(name, seen)
            assert found is not None
            return found

    @contextlib.contextmanager
    def listening(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have `wake` called, from any thread, after every change."""
        with self._changed:
            self._listeners.append(wake)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(wake)

    # -------------------------------------------------------------------------------- the life

    @contextlib.contextmanager
    def written_by_this_thread(self) -> Iterator[None]:
        """The block appends; others wait for its end before they call the text complete."""
        self._author, self._open = threading.get_ident(), True
        try:
            yield
        finally:
            with self.changing():
                self._open = False

    def expect_author(self) -> None:
        """A thread that will write is about to start."""
        self._author, self._open = 0, True

    @property
    def _complete(self) -> bool:
        return not self._open

    @property
    def _mine(self) -> bool:
        return self._author in (None, threading.get_ident())

    def _wait_for(self, name: str, timeout_s: float | None) -> None:
        def decided() -> bool:
            if self.error is not None:
                return True
            here = name in self.variables or self._complete or self._mine
            return not self._promised[name] and here

        with self._changed:
            if not self._changed.wait_for(decided, timeout_s):
                raise TimeoutError(f"{name!r} did not come within {timeout_s} s")
            if self.error is not None and (self._promised[name] or name not in self.variables):
                raise self.error

    def _run(self, *, hand_over: bool) -> None:
        """Run steps until none is left, or hand over to a thread at the first long one."""
        while (step := self._next(hand_over)) is not None:
            try:
                execute.run(self, step)
            except Exception as error:
                self.fail(error)
                return
            with self.changing():
                self._promised.subtract(step.keeps())

    def _next(self, hand_over: bool) -> Step | None:
        with self._changed:
            if not self._steps:
                self._running = False
                self._notify()
                return None
            if hand_over and self._steps[0].asks_model:
                context = contextvars.copy_context()
                target = self._run_alone
                threading.Thread(target=context.run, args=(target,), daemon=True).start()
                return None
            return self._steps.popleft()

    def _run_alone(self) -> None:
        self._run(hand_over=False)

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._listeners:
            wake()

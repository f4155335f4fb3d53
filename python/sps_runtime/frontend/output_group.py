"""The outputs of several sequences as one stream, woken once for many messages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from sps_runtime.frontend.patience import Patience
from sps_runtime.frontend.request_state import Output, RequestState


class OutputGroup:
    """All sequences of one client request; one task reads it.

    Every sequence yields any number of outputs and exactly one that has `finish` set. What arrives
    while the reader is busy is joined, so a slow reader costs one buffer, not a queue.

    Args:
        states: the sequences, in order.
        abort: ends given sequences that have not ended yet.
        interval: tokens that a sequence gathers before its reader is woken.
    """

    def __init__(
        self,
        states: Sequence[RequestState],
        abort: Callable[[Sequence[RequestState], str], None],
        interval: int = 1,
    ) -> None:
        self.states = tuple(states)
        self._abort = abort
        self._interval = interval
        self._open = len(states)
        self._ready: deque[RequestState] = deque()
        self._queued: set[str] = set()
        self._waiter: asyncio.Future[None] | None = None
        self._patience: Patience | None = None
        self._progressed = False

    def notify(self, state: RequestState) -> None:
        """Called by the manager when `state` has news."""
        first = 0 < state.pending_tokens == state.completion_tokens
        due = first or state.pending_tokens >= self._interval or state.finish is not None
        if not due or state.rid in self._queued:
            return
        self._queued.add(state.rid)
        self._ready.append(state)
        self._wake()

    def notify_progress(self) -> None:
        """Called by the manager when a prefill has come further."""
        self._progressed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def prefill(self) -> tuple[int, int] | None:
        """Prompt tokens done and in all, of all sequences; None when no prefill is known to be
        under way."""
        if not any(state.phase == "prefill" for state in self.states):
            return None
        totals = sum(state.prompt_tokens for state in self.states)
        return sum(state.prefilled for state in self.states), totals

    async def next(self, timeout_s: float | None = None) -> Output | None:
        """Return the next output; None when none came in time, or when a prefill came further.

        Raises:
            StopAsyncIteration: every sequence has given its last output.
        """
        while not self._ready:
            if not self._open:
                raise StopAsyncIteration
            if self._progressed:
                self._progressed = False
                return None
            if not await self._news(timeout_s):
                return None
        state = self._ready.popleft()
        self._queued.discard(state.rid)
        output = state.take()
        if output.finish is not None:
            self._open -= 1
        return output

    async def _news(self, timeout_s: float | None) -> bool:
        """Wait until there is something to look at; False when nothing came in time."""
        patience = self._patient(timeout_s)
        self._waiter = asyncio.get_running_loop().create_future()
        if patience is not None:
            patience.begin()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if patience is not None:
                patience.end()
        return bool(self._ready) or self._progressed

    def _patient(self, timeout_s: float | None) -> Patience | None:
        known = self._patience
        if timeout_s is not None and (known is None or known.timeout_s != timeout_s):
            if known is not None:
                known.close()
            self._patience = Patience(timeout_s, self._wake)
        return None if timeout_s is None else self._patience

    async def __aiter__(self) -> AsyncIterator[Output]:
        while True:
            try:
                output = await self.next()
            except StopAsyncIteration:
                return
            if output is not None:
                yield output

    def abort(self, why: str = "the client went away") -> None:
        """End every sequence that still runs; harmless when none does."""
        if self._patience is not None:
            self._patience.close()
        self._abort(self.states, why)

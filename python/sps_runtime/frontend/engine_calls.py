"""Calls to the scheduler that have an answer."""

from __future__ import annotations

import asyncio
from itertools import count

from sps_runtime.frontend.engine_link import EngineLink
from sps_runtime.types.errors import EngineDead
from sps_runtime.types.messages import EngineState, FlushCache, GetState, Record, Reply

CALL_TIMEOUT_S = 30.0


class EngineCalls:
    """Numbers calls and hands each answer to who waits for it.

    Args:
        link: the scheduler.
        timeout_s: how long an answer may take.
    """

    def __init__(self, link: EngineLink, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._link = link
        self._timeout_s = timeout_s
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Reply | EngineState]] = {}

    async def flush_cache(self) -> Reply:
        """Ask the scheduler to drop its cache; `ok` is false while requests run or wait."""
        number = next(self._numbers)
        reply = await self._call(number, FlushCache(number))
        if not isinstance(reply, Reply):
            raise EngineDead("the engine gave another answer")
        return reply

    async def record(self, on: bool) -> Reply:
        """Go on with the timeline or pause it; `ok` is false where there is none."""
        number = next(self._numbers)
        reply = await self._call(number, Record(number, on))
        if not isinstance(reply, Reply):
            raise EngineDead("the engine gave another answer")
        return reply

    async def fetch_state(self) -> EngineState:
        """Ask the scheduler for a fresh state."""
        number = next(self._numbers)
        state = await self._call(number, GetState(number))
        if not isinstance(state, EngineState):
            raise EngineDead("the engine gave another answer")
        return state

    async def _call(
        self, number: int, message: FlushCache | GetState | Record
    ) -> Reply | EngineState:
        future: asyncio.Future[Reply | EngineState] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._link.send(message)
            async with asyncio.timeout(self._timeout_s):
                return await future
        except (TimeoutError, ConnectionError):
            raise EngineDead("the engine does not answer") from None
        finally:
            del self._waiting[number]

    def answer(self, message: Reply | EngineState) -> None:
        """Take an answer; one that nobody waits for is ignored."""
        call = self._waiting.get(message.call)
        if call is not None and not call.done():
            call.set_result(message)

    def fail_all(self, why: str) -> None:
        for call in self._waiting.values():
            if not call.done():
                call.set_exception(EngineDead(why))

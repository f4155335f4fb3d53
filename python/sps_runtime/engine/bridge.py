"""An event loop in a thread, and the ways to it from threads and from other loops."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Put = Callable[[Any], None]


class _End:
    """The last thing a stream puts: how it ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class LoopThread:
    """Runs coroutines on a loop of its own thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait for it here; an interrupted wait cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run_async(self, work: Coroutine[Any, Any, T]) -> T:
        """`run` for a caller on another loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def stream(self, work: Callable[[Put], Coroutine[Any, Any, None]]) -> Iterator[Any]:
        """Yield what `work` puts; it is cancelled when the iterator is dropped."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(_until_end(work, items.put), self.loop)
        try:
            while not isinstance(item := items.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            future.cancel()

    async def stream_async(
        self, work: Callable[[Put], Coroutine[Any, Any, None]]
    ) -> AsyncIterator[Any]:
        """`stream` for a caller on another loop."""
        items: asyncio.Queue[Any] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def put(item: Any) -> None:
            caller.call_soon_threadsafe(items.put_nowait, item)

        future = asyncio.run_coroutine_threadsafe(_until_end(work, put), self.loop)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(timeout=10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _until_end(work: Callable[[Put], Coroutine[Any, Any, None]], put: Put) -> None:
    error: BaseException | None = None
    try:
        await work(put)
    except asyncio.CancelledError:
        raise
    except Exception as caught:
        error = caught
    put(_End(error))


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""uvicorn with our bounds, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.ipc.process import DRAIN_SIGNAL
from sps_runtime.server.http_protocol import BoundedHttpProtocol

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
ANSWER_S = 1.0
"""How long clients are given to take their last words when the engine has failed."""


class HttpServer(uvicorn.Server):
    """Serves until told to stop.

    The first `DRAIN_SIGNAL` drains: new requests get 503, running ones finish. The second, or the
    drain's timeout, ends everything. When the engine fails, everyone is answered and the server
    ends.

    Args:
        app: the application.
        manager: knows what is running.
        drain_timeout_s: how long running requests may take to finish.
    """

    def __init__(self, app: ASGIApp, manager: TokenizerManager, drain_timeout_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )
        self._manager = manager
        self._drain_timeout_s = drain_timeout_s
        self._draining = False
        self._drain_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the parent's signal only: others reach the whole group, and the parent decides."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(DRAIN_SIGNAL, self.handle_exit)
        try:
            yield
        finally:
            signal.signal(DRAIN_SIGNAL, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A stop signal came; called in the main thread between bytecodes."""
        if self._manager.health.failure:
            return  # everyone is being answered, and the end is near
        if self._loop is None or self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        self._manager.health.drain()
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("draining: %d requests are running", self._manager.inflight)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                while self._manager.inflight:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logger.warning("draining timed out with %d requests", self._manager.inflight)
            self._manager.abort_all()
        self.should_exit = True

    async def serve_until_stopped(
        self, listener: socket.socket, beside: list[Coroutine[Any, Any, Any]]
    ) -> bool:
        """Serve on `listener`, with coroutines running beside.

        Returns whether it ended in good order (a signal) and not because the engine failed.
        """
        self._loop = asyncio.get_running_loop()
        engine = asyncio.create_task(self._manager.run())
        others = [asyncio.create_task(other) for other in beside]
        engine.add_done_callback(self._engine_ended)
        try:
            await self.serve(sockets=[listener])
        finally:
            for task in (engine, *others):
                task.cancel()
            self._manager.close()
        return not self._manager.health.failure

    def _engine_ended(self, task: asyncio.Task[str]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("the engine's messages cannot be read", exc_info=error)
            self._manager.fail_all("the engine's messages cannot be read")
        loop = asyncio.get_running_loop()
        loop.call_later(ANSWER_S / 2, setattr, self, "should_exit", True)
        loop.call_later(ANSWER_S, setattr, self, "force_exit", True)

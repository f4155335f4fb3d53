"""The real HTTP server over an engine in memory, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.process import GrammarWorkerConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.frontend.grammar_checker import GrammarChecker
from sps_runtime.frontend.health import Health
from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.frontend.validation import Gate
from sps_runtime.server.app import ROUTES, RouteSpec, build_app
from sps_runtime.server.auth import Keys
from sps_runtime.server.generation_probe import GenerationProbe
from sps_runtime.server.http_server import HttpServer
from sps_runtime.server.metrics import Metrics
from sps_runtime.server.service import Service, Timeouts
from test.kit.fake_engine import FakeEngine

VOCAB_SIZE = 512


class LiveServer:
    """A server on an ephemeral port of this machine; use it as a context manager.

    Args:
        directory: of a tokenizer.
        engine: the engine, made in the server's loop.
        server: settings.
        context_length: tokens.
        timeouts: for tests that wait for them.
        keys: of users and administrators.
        heartbeat_timeout_s: until a silent engine counts as hung.
    """

    def __init__(
        self,
        directory: Path,
        engine: Callable[[], FakeEngine] = FakeEngine,
        *,
        server: ServerConfig | None = None,
        context_length: int = 4096,
        timeouts: Timeouts | None = None,
        keys: Keys | None = None,
        routes: Sequence[RouteSpec] = ROUTES,
        max_inflight: int = 1280,
        heartbeat_timeout_s: float = 20.0,
    ) -> None:
        self._directory = directory
        self._make_engine = engine
        self._config = server or ServerConfig(
            served_model_name="test-model", enable_metrics=True, enable_cache_report=True
        )
        self._context_length = context_length
        self._timeouts = timeouts or Timeouts()
        self._keys = keys or Keys()
        self._routes = routes
        self._max_inflight = max_inflight
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.good_end: bool | None = None
        self.engine: FakeEngine
        self.manager: TokenizerManager
        self.http: HttpServer
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.http.should_exit = self.http.force_exit = True
        self.join()

    def join(self, timeout_s: float = 10) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run `function` in the server's loop, soon."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.good_end = runner.run(self._serve())

    async def _serve(self) -> bool:
        self.loop = asyncio.get_running_loop()
        self.engine = self._make_engine()
        metrics = Metrics("test-model")
        limits = Limits(context_length=self._context_length, vocab_size=VOCAB_SIZE)
        self.manager = TokenizerManager(
            self.engine,
            Tokenizer(self._directory),
            Gate(limits),
            observer=metrics,
            max_inflight=self._max_inflight,
            grammars=GrammarChecker(
                GrammarWorkerConfig(
                    backend="llguidance",
                    tokenizer_path=str(self._directory),
                    vocab_size=VOCAB_SIZE,
                    eos_token_ids=(2,),
                )
            ),
            health=Health(heartbeat_timeout_s=self._heartbeat_timeout_s),
        )
        service = Service(
            manager=self.manager,
            server=self._config,
            engine=EngineConfig(model_path="/models/tiny"),
            metrics=metrics,
            probe=GenerationProbe(self.manager, self._timeouts.probe),
            timeouts=self._timeouts,
        )
        app = build_app(service, self._keys, self._routes)
        self.http = HttpServer(app, self.manager, drain_timeout_s=5.0)
        beside = [self.engine.live(), metrics.watch_loop(), self._announce()]
        return await self.http.serve_until_stopped(self._socket, beside)

    async def _announce(self) -> None:
        while not self.http.started:
            await asyncio.sleep(0.005)
        if self.engine.said_ready:
            await self.manager.wait_ready()
        self._started.set()

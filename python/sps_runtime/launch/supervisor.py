"""The parent process of a server: starts the family, watches it, and ends it as one.

Every process is a direct child. The first unexpected death ends the server: clients that wait are
answered by the HTTP process, everything else is killed at once, and nothing waits on a collective.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket
import time

from sps_runtime.config.environment import service_environment
from sps_runtime.config.process import FrontendConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.ipc.links import Sender, new_context
from sps_runtime.ipc.process import DRAIN_SIGNAL, Child, ChildFailed, ChildReady, spawn
from sps_runtime.launch.processes import EngineProcesses, kill_all
from sps_runtime.launch.watch import Died, Event, Said, Signalled, Watch
from sps_runtime.types.messages import EngineFailed, StopEngine, ToFrontend, ToScheduler

logger = logging.getLogger(__name__)

HTTP_MODULE = "sps_runtime.server.process"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ANSWER_S = 2.5
"""How long the HTTP process may take to answer its clients after the engine failed."""
GOODBYE_S = 3.0
"""How long the engine may take to end in good order."""
TICK_S = 1.0


class Phase(enum.Enum):
    """Where the server stands in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Supervisor:
    """Runs one server from start to exit status.

    Args:
        engine: its processes, not yet started.
        server: settings of the HTTP process.
        listener: the bound, listening HTTP socket.
        watch: with the stop signals caught already.
    """

    def __init__(
        self,
        engine: EngineProcesses,
        server: ServerConfig,
        listener: socket.socket,
        watch: Watch,
    ) -> None:
        self._engine = engine
        self._server = server
        self._listener = listener
        self._watch = watch
        self._phase = Phase.STARTING
        self._http: Child | None = None
        self._unready: set[Child] = set()
        self._drain_deadline = 0.0
        self._began = time.monotonic()

    def run(self) -> int:
        """Serve until something ends it; the exit status."""
        try:
            self._start()
            while True:
                for event in self._watch.wait(TICK_S):
                    status = self._handle(event)
                    if status is not None:
                        return status
                status = self._tick()
                if status is not None:
                    return status
        finally:
            self._close()

    def _start(self) -> None:
        engine = self._engine
        engine.start()
        settings = FrontendConfig(
            server=self._server,
            engine=engine.config,
            endpoints=engine.endpoints,
            eos_token_ids=engine.model.eos_token_ids,
            vocab_size=engine.model.vocab_size,
            log=engine.log,
        )
        fds = {"http": self._listener.fileno()}
        run_dir = engine.run_dir.path if engine.run_dir else None
        self._http = spawn(
            HTTP_MODULE,
            settings,
            name="http",
            fds=fds,
            cores=engine.config.service_cores,
            removes=run_dir,
            environment=service_environment(),
        )
        for child in self._children():
            self._watch.add(child)
            self._unready.add(child)

    def _children(self) -> list[Child]:
        return [*self._engine.children, *([self._http] if self._http else [])]

    def _handle(self, event: Event) -> int | None:
        """React to one event; an exit status ends the server."""
        match event:
            case Said(child, ChildReady(detail)):
                self._child_ready(child, detail)
            case Said(child, ChildFailed(message)):
                return self._fail(f"{child.name}: {message}")
            case Died(child, code):
                return self._child_died(event, code)
            case Signalled(number) if number in STOP_SIGNALS:
                return self._stop(number)
        return None

    def _child_ready(self, child: Child, detail: str) -> None:
        logger.debug("%s is ready %s", child.name, detail)
        self._unready.discard(child)
        if not self._unready and self._phase is Phase.STARTING:
            self._phase = Phase.READY
            host, port = self._listener.getsockname()[:2]
            logger.info(
                "ready after %.1f s: http://%s:%d", time.monotonic() - self._began, host, port
            )

    def _child_died(self, event: Died, code: int) -> int | None:
        if event.child is self._http and self._phase is Phase.DRAINING and code == 0:
            return self._say_goodbye()
        return self._fail(event.how)

    def _stop(self, number: int) -> int | None:
        """First signal: let running requests finish. Second, or while starting: end at once."""
        if self._phase is not Phase.READY or self._http is None:
            logger.warning("%s: ending at once", signal.Signals(number).name)
            return 128 + number
        logger.info("%s: draining; once more to end at once", signal.Signals(number).name)
        self._phase = Phase.DRAINING
        self._drain_deadline = time.monotonic() + self._server.drain_timeout_s + GOODBYE_S
        self._http.kill(DRAIN_SIGNAL)
        return None

    def _say_goodbye(self) -> int:
        """HTTP has drained: end the engine in good order."""
        context = new_context()
        sender: Sender[ToScheduler] = Sender(context, self._engine.endpoints.scheduler)
        sender.send(StopEngine())
        if not self._watch.wait_for_deaths(self._engine.children, GOODBYE_S):
            logger.warning("the engine did not end in %.0f s and is killed", GOODBYE_S)
        sender.close()
        context.term()
        logger.info("stopped")
        return 0

    def _fail(self, reason: str) -> int:
        """End the server now: answer who waits, leave nothing running."""
        logger.error("%s; the server ends", reason)
        http_lives = self._http is not None and self._http.process.poll() is None
        if self._http is not None and http_lives and self._phase is not Phase.STARTING:
            self._answer_waiting(self._http, reason)
        return 1

    def _answer_waiting(self, http: Child, reason: str) -> None:
        context = new_context()
        sender: Sender[ToFrontend] = Sender(context, self._engine.endpoints.frontend)
        sender.send(EngineFailed(reason))
        self._engine.kill()
        http.kill(DRAIN_SIGNAL)
        self._watch.wait_for_deaths([http], ANSWER_S)
        sender.close()
        context.term()

    def _tick(self) -> int | None:
        if self._phase is Phase.DRAINING and time.monotonic() > self._drain_deadline:
            return self._fail("draining took too long")
        age = self._engine.heartbeat.age_s()
        limit = self._engine.config.watchdog_timeout_s
        if age is not None and age > limit:
            kill_all(self._children(), signal.SIGUSR1)  # their stacks, for whoever reads the log
            time.sleep(0.2)
            return self._fail(f"the scheduler has been stuck for {age:.1f} s")
        return None

    def _close(self) -> None:
        self._engine.close()
        if self._http is not None:
            self._http.close()
        self._watch.close()
        self._listener.close()
        logger.debug("process %d ends", os.getpid())

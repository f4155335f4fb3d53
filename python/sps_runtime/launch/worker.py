"""The parent process on a host that has ranks only: starts them, and ends with them."""

from __future__ import annotations

import logging
import signal

from sps_runtime.ipc.process import ChildFailed, ChildReady
from sps_runtime.launch.processes import EngineProcesses
from sps_runtime.launch.watch import Died, Event, Said, Signalled, Watch

logger = logging.getLogger(__name__)


class Worker:
    """Runs the ranks of one host from start to exit status.

    The scheduler on node 0 tells ranks to stop; all of them exit with status 0 then. Anything else
    ends the host's part at once, and the scheduler sees its links close.

    Args:
        engine: its processes, not yet started.
        watch: with the stop signals caught already.
    """

    def __init__(self, engine: EngineProcesses, watch: Watch) -> None:
        self._engine = engine
        self._watch = watch
        self._running = 0

    def run(self) -> int:
        """Work until something ends it; the exit status."""
        try:
            self._engine.start()
            self._running = len(self._engine.children)
            for child in self._engine.children:
                self._watch.add(child)
            while True:
                for event in self._watch.wait(60.0):
                    status = self._handle(event)
                    if status is not None:
                        return status
        finally:
            self._engine.close()
            self._watch.close()

    def _handle(self, event: Event) -> int | None:
        """React to one event; an exit status ends this host's part."""
        match event:
            case Said(child, ChildReady(detail)):
                logger.info("%s is ready: %s", child.name, detail)
            case Said(child, ChildFailed(message)):
                logger.error("%s: %s", child.name, message)
                return 1
            case Died(_, 0):
                self._running -= 1
                if not self._running:
                    logger.info("stopped")
                    return 0
            case Died():
                logger.error("%s; this host's ranks end", event.how)
                return 1
            case Signalled(number):
                logger.warning("%s: ending at once", signal.Signals(number).name)
                return 128 + number
        return None

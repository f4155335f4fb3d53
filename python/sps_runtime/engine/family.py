"""Scheduler and ranks beside a user's program: started, watched from a thread, ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sps_runtime.ipc.process import ChildFailed, ChildReady
from sps_runtime.launch.processes import EngineProcesses
from sps_runtime.launch.watch import Died, Said, Watch
from sps_runtime.types.errors import EngineDead

START_TIMEOUT_S = 600.0


class Family:
    """Runs an `EngineProcesses` for a program that does something else.

    The processes end with the program, however it ends: by signal where the main thread made the
    engine, and by EOF on a pipe in any case; the scheduler then removes the run directory.

    Args:
        processes: not yet started; owned from now on.
    """

    def __init__(self, processes: EngineProcesses) -> None:
        self.processes = processes
        self._watch = Watch()
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the processes; `wait_ready` waits for them."""
        self.processes.start()
        for child in self.processes.children:
            self._watch.add(child)

    def wait_ready(self) -> None:
        """Wait until scheduler and ranks can work.

        Raises:
            EngineDead: one of them cannot; the message says why.
        """
        waiting = set(self.processes.children)
        deadline = time.monotonic() + START_TIMEOUT_S
        while waiting:
            if time.monotonic() > deadline:
                raise EngineDead(f"{min(child.name for child in waiting)} does not become ready")
            for event in self._watch.wait(1.0):
                match event:
                    case Said(child, ChildReady()):
                        waiting.discard(child)
                    case Said(child, ChildFailed(message)):
                        raise EngineDead(f"{child.name}: {message}")
                    case Died():
                        raise EngineDead(event.how)

    def watch(self, on_death: Callable[[str], None]) -> None:
        """From now on call `on_death`, in a thread, when a process dies; the others are killed."""
        self._thread = threading.Thread(
            target=self._run, args=(on_death,), name="engine-watch", daemon=True
        )
        self._thread.start()

    def _run(self, on_death: Callable[[str], None]) -> None:
        while not self._ending:
            deaths = [event for event in self._watch.wait(60.0) if isinstance(event, Died)]
            if deaths and not self._ending:
                self.processes.kill()
                on_death(deaths[0].how)
                return

    def close(self) -> None:
        """End everything and leave nothing behind."""
        self._ending = True
        if self._thread is not None:
            self._watch.wake()
            self._thread.join()
        self.processes.close()
        self._watch.close()

"""Is the engine alive? Read from heartbeats; nothing is ever sent to the scheduler to find out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from sps_runtime.types.messages import EngineState

State = Literal["starting", "ready", "draining", "hung", "crashed"]
HEARTBEAT_TIMEOUT_S = 20.0


class Health:
    """The engine's state as the front end sees it.

    Args:
        watchdog_s: a running step without news for this long is a hang.
        heartbeat_timeout_s: the scheduler reports about once a second; silence for this long is a
            hang, too.
        clock: monotonic seconds.

    Attributes:
        engine: the newest `EngineState`.
        failure: why the engine is gone, "" while it is not.
    """

    def __init__(
        self,
        *,
        watchdog_s: float = 300.0,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watchdog_s = watchdog_s
        self._timeout_s = heartbeat_timeout_s
        self._clock = clock
        self._ready = False
        self._draining = False
        self._last_beat = clock()
        self.engine = EngineState()
        self.failure = ""

    @property
    def state(self) -> State:
        if self.failure:
            return "crashed"
        if not self._ready:
            return "starting"
        silent_s = self._clock() - self._last_beat
        if silent_s > self._timeout_s or self.engine.step_age_s > self._watchdog_s:
            return "hung"
        return "draining" if self._draining else "ready"

    @property
    def serving(self) -> bool:
        """Whether new requests may come in."""
        return self.state == "ready"

    def beat(self, state: EngineState | None = None) -> None:
        """Note that the scheduler spoke."""
        self._last_beat = self._clock()
        if state is not None:
            self.engine = state

    def ready(self) -> None:
        self._ready = True
        self.beat()

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        self._draining = True

    def crash(self, why: str) -> None:
        self.failure = self.failure or why or "the engine failed"

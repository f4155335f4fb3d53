"""One timer for many short waits.

`asyncio.timeout` makes and cancels a timer for every wait. Where a token comes every few
milliseconds and a core is short, that is a good part of what its delivery costs; here a wait costs
a look at the clock, and a timer runs out once per `timeout_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Patience:
    """Tells when a wait has lasted too long. One wait at a time.

    Args:
        timeout_s: how long a wait may last.
        late: called once for each wait that lasts longer.
    """

    def __init__(self, timeout_s: float, late: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins."""
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self.timeout_s, self._look)

    def end(self) -> None:
        """It is over."""
        self._since = None

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left = self._since + self.timeout_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        self._since = None
        self._late()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

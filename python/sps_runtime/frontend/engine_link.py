"""How the front end reaches the scheduler: two calls, so that a test can be the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sps_runtime.types.messages import ToFrontend, ToScheduler


class EngineLink(Protocol):
    """Both directions between the front end and the scheduler."""

    def send(self, message: ToScheduler) -> None:
        """Queue one message without blocking. Raises ConnectionError when that is impossible."""
        ...

    async def receive(self) -> Sequence[ToFrontend]:
        """Wait for messages and return all that are here, in order."""
        ...

"""A text being written, as its steps see it: between steps and the branch that runs them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from sps_runtime.lang.backend import Backend
from sps_runtime.lang.sampling import Sampling


class Draft(Protocol):
    """Attributes:
    backend: the model.
    sampling: options of every generation that does not say otherwise.
    stream: whether generated text becomes visible piece by piece.
    messages: those that have ended, as chat templates take them.
    role, role_start: of the message that has begun: None for none, and where its text begins.
    fork_start: where the text of this branch begins, behind its parent's.
    variables, meta_info: by name.
    scopes: where the text of each open one begins.
    error: what ended it.
    """

    backend: Backend
    sampling: Sampling
    stream: bool
    text: str
    messages: list[dict[str, str]]
    role: str | None
    role_start: int
    fork_start: int
    variables: dict[str, Any]
    meta_info: dict[str, Any]
    scopes: dict[str, int]
    error: Exception | None

    def write(self, text: str) -> None:
        """Append text, from inside of a step."""
        ...

    def changing(self) -> AbstractContextManager[None]:
        """Change what others may be waiting for."""
        ...

    def sync(self) -> None:
        """Wait until all that was appended has run, or failed."""
        ...

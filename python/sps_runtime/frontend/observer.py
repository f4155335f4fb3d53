"""What the manager tells about requests, for metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sps_runtime.types.attention import AttentionReport


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """One finished sequence. Seconds are of this process's monotonic clock.

    Attributes:
        reason: ``stop``, ``length``, ``abort`` or ``error``.
        first_token_s: from arrival to the first token, None where there was none.
        total_s: from arrival to the end.
        attention: of requests that asked for sparse attention.
    """

    rid: str
    label: str
    reason: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float | None
    total_s: float
    attention: AttentionReport | None = None


class RequestObserver(Protocol):
    """Called by the manager, on the event loop; must return at once."""

    def accepted(self, prompt_tokens: int) -> None: ...

    def rejected(self, reason: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def more_tokens(self, count: int, seconds: float) -> None:
        """`count` tokens came `seconds` after the last ones."""
        ...

    def finished(self, summary: RequestSummary) -> None: ...

    def late_message(self) -> None:
        """News of a request that has ended here: normal after an abort."""
        ...


class NullObserver:
    """Listens to nothing."""

    def accepted(self, prompt_tokens: int) -> None: ...

    def rejected(self, reason: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def more_tokens(self, count: int, seconds: float) -> None: ...

    def finished(self, summary: RequestSummary) -> None: ...

    def late_message(self) -> None: ...

"""Errors that travel: what a request or a start-up can fail with."""

from __future__ import annotations


class SpsError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidRequest(SpsError):
    """A request that can never be served as it is; becomes a 4xx naming the field.

    Attributes:
        field: the name of the offending field as the client wrote it, or None.
        status: the HTTP status, 400 unless told.
        code: OpenAI's short error code, such as ``context_length_exceeded``.
    """

    def __init__(
        self, message: str, *, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status
        self.code = code


class ConfigError(SpsError):
    """A setting that cannot work: the launcher prints it and exits with a nonzero status."""


class EngineDead(SpsError):
    """A process of the engine is gone; every waiting request is answered with this."""


class QueueFull(InvalidRequest):
    """The waiting queue is at its bound; becomes a 503 with Retry-After."""

    def __init__(self, message: str = "the waiting queue is full, retry later") -> None:
        super().__init__(message, status=503, code="queue_full")

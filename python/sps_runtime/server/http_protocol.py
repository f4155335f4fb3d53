"""uvicorn's HTTP protocol with bounds on what comes before a body."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sps_runtime.server.event_stream import ABORT_EXTENSION

MAX_HEADER_BYTES = 16 << 10
MAX_HEADERS = 64
HEADER_TIMEOUT_S = 30.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Ends connections whose header lines are too many, too long or too slow.

    It also lends the application a way to cut off a client that does not read
    (`event_stream.ABORT_EXTENSION`): an orderly close would wait for it for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._header_lines = 0
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_late)

    def _headers_late(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._header_lines = 0
        scope: Any = self.scope
        scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}

    def on_url(self, url: bytes) -> None:
        self._count(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value), 1)
        super().on_header(name, value)

    def _count(self, size: int, lines: int) -> None:
        """Raising inside of a parser callback makes uvicorn answer 400 and close."""
        self._header_bytes += size
        self._header_lines += lines
        if self._header_bytes > MAX_HEADER_BYTES or self._header_lines > MAX_HEADERS:
            raise ValueError("the header is too long")

    def on_headers_complete(self) -> None:
        self._header_timer.cancel()
        super().on_headers_complete()

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection ends; one whose client has not read its last answer is cut off."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

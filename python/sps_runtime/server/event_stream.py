"""Server-sent events: headers at admission, comments in silence, a bound on slow clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.patience import Patience
from sps_runtime.frontend.request_state import Output
from sps_runtime.server.answers import aborted_with_client, raise_failure
from sps_runtime.server.error_handlers import describe, request_id_header
from sps_runtime.server.service import Call

logger = logging.getLogger(__name__)

ABORT_EXTENSION = "sps.abort"
"""ASGI extension of our protocol class: closes the connection without waiting for its reader."""
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_LINE_ENDS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\x85\u2028\u2029")
Events = Callable[[Output], Iterable[Any]]


@dataclass(frozen=True)
class Framing:
    """How events look on the wire.

    Attributes:
        event: one JSON-able event.
        failed: an exception, as the last event.
        end: what follows the last event.
    """

    event: Callable[[Any], bytes]
    failed: Callable[[Exception], bytes]
    end: bytes = b""


def data_event(payload: Any) -> bytes:
    """An event without a name.

    U+0085, U+2028 and U+2029 are escaped: clients that split decoded text into lines as Python does
    (httpx, and what is built on it) would cut the event there.
    """
    body = msgspec.json.encode(payload)
    for line_end, escaped in _LINE_ENDS:
        if line_end in body:
            body = body.replace(line_end, escaped)
    return b"data: " + body + b"\n\n"


def named_event(payload: Mapping[str, Any]) -> bytes:
    """An event with the name that its ``type`` is."""
    return b"event: %s\n%s" % (str(payload["type"]).encode(), data_event(payload))


def _failed(error: Exception) -> bytes:
    return data_event({"error": describe(error)[1]["error"]})


DATA_ONLY = Framing(data_event, _failed, _DONE)
"""SGLang's and OpenAI's first APIs: nameless events, then ``[DONE]``."""


class _Writer:
    """Writes a body; one write may wait for `stall_s` for the client to read.

    Raises:
        TimeoutError: by `write`, when it waited longer.
    """

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send = send
        self._task = asyncio.current_task()
        self._patience = Patience(stall_s, self._stalled)
        self._late = False

    async def write(self, chunk: bytes) -> None:
        self._patience.begin()
        try:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError:
            if self._late and self._task is not None and not self._task.uncancel():
                raise TimeoutError from None
            raise
        finally:
            self._patience.end()

    def _stalled(self) -> None:
        self._late = True
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        self._patience.close()


class EventStream:
    """The streamed answer of an admitted group.

    Args:
        call: the HTTP request.
        group: its sequences.
        events: turns one output into JSON-able events.
        opening: events sent before the first output.
        closing: makes the events after the last one.
        headers: further response headers.
        framing: how events look.
    """

    def __init__(
        self,
        call: Call,
        group: OutputGroup,
        events: Events,
        *,
        opening: Iterable[Any] = (),
        closing: Callable[[], Iterable[Any]] = tuple,
        headers: Mapping[str, str] | None = None,
        framing: Framing = DATA_ONLY,
    ) -> None:
        self._request = call.request
        self._timeouts = call.service.timeouts
        self._group = group
        self._events = events
        self._opening = opening
        self._closing = closing
        self._framing = framing
        self._ended = False
        self._headers = {**_HEADERS, **request_id_header(call.request), **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aborted_with_client(self._request, self._group):
                await self._run(send)
        except TimeoutError:
            logger.warning("a client that does not read was cut off")
            abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
            if abort is not None:
                abort()
        except OSError:
            logger.debug("a client went away")

    async def _run(self, send: Send) -> None:
        headers = [(k.encode(), v.encode("latin-1")) for k, v in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writer = _Writer(send, self._timeouts.stall)
        try:
            await writer.write(self._joined(self._opening))
            while not self._ended:
                await writer.write(await self._chunk())
            await writer.write(self._framing.end)
        finally:
            writer.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunk(self) -> bytes:
        """What comes next; `_ended` is set with the last."""
        try:
            output = await self._next()
            if output is not None:
                raise_failure(output.finish)
                return self._joined(self._events(output))
            return self._joined(self._closing()) if self._ended else self._comment()
        except Exception as error:
            self._ended = True
            return self._framing.failed(error)

    async def _next(self) -> Output | None:
        try:
            return await self._group.next(self._timeouts.ping)
        except StopAsyncIteration:
            self._ended = True
            return None

    def _joined(self, events: Iterable[Any]) -> bytes:
        return b"".join(map(self._framing.event, events))

    def _comment(self) -> bytes:
        """What clients ignore: how far the prefill is, or a sign of life."""
        prefill = self._group.prefill()
        return _PING if prefill is None else b": prefill %d/%d\n\n" % prefill

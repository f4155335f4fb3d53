"""Clients of SGLang's event stream that time every token: one request, or several by one thread."""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """One streamed generation: arrival times of its tokens, seconds since the request."""

    times: list[float] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    def take(self, line: bytes, now: float) -> None:
        """One line of the stream that came `now`; an event of several tokens counts it for each."""
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        self.meta = event["meta_info"]
        fresh = self.meta["completion_tokens"] - len(self.times)
        self.times.extend([now] * fresh)


def read_stream(response: http.client.HTTPResponse, start: float) -> Stream:
    """Read one answer as it comes; times count from `start`."""
    result = Stream()
    if response.status != 200:
        raise RuntimeError(response.read().decode()[:500])
    for line in response:
        result.take(line, time.perf_counter() - start)
    return result


@dataclass
class _Answer:
    """What came over one connection, and when: pieces are only kept until all is here."""

    connection: socket.socket
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def stream(self, start: float) -> Stream:
        """The pieces as a stream: a line came when its last byte did."""
        result, rest = Stream(), b""
        whole = b"".join(piece for _, piece in self.pieces)
        head = whole.partition(b"\r\n\r\n")[0]
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(whole.decode()[:500])
        for moment, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                result.take(line, moment - start)
        return result


def stream_together(
    port: int, bodies: Sequence[dict[str, Any]], timeout: float = 600
) -> list[Stream]:
    """Send several streamed requests at once and time their tokens, all from this thread.

    A client on the cores of the server that it measures should take as little of them as it can:
    it sleeps until something has come from any, and reads what it means after the last has ended.

    Args:
        timeout: seconds without a byte.
    Returns:
        A stream of each body, in order; all times count from when the first was sent.
    """
    start = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        answers = [_Answer(_ask(port, body)) for body in bodies]
        for answer in answers:
            selector.register(answer.connection, selectors.EVENT_READ, answer)
        while selector.get_map():
            ready = selector.select(timeout)
            if not ready:
                raise TimeoutError(f"no byte for {timeout:g} s")
            now = time.perf_counter()
            for key, _ in ready:
                piece = key.data.connection.recv(1 << 16)
                key.data.pieces.append((now, piece))
                if not piece:
                    selector.unregister(key.data.connection)
                    key.data.connection.close()
    return [answer.stream(start) for answer in answers]


def _ask(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent, by HTTP/1.0: its answer ends with it, uncut."""
    encoded = json.dumps(body).encode()
    head = (
        "POST /generate HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + encoded)
    return connection

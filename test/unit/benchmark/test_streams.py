"""The benchmarks' client of several streams: times and tokens whatever way bytes are cut."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from streams import stream_together


def event(tokens: int, **more: Any) -> bytes:
    said = {"text": "", "meta_info": {"completion_tokens": tokens}, **more}
    return f"data: {json.dumps(said)}\n\n".encode()


@contextmanager
def serving(answers: dict[int, list[bytes]], status: str = "200 OK") -> Iterator[int]:
    """A port where a request for tokens [i] gets the pieces of answer i, 10 ms apart."""

    def serve(connection: socket.socket) -> None:
        request = b""
        with connection:
            while b"\r\n\r\n" not in request or not request.endswith(b"}"):
                request += connection.recv(1 << 16)
            body = json.loads(request.partition(b"\r\n\r\n")[2])
            connection.sendall(
                f"HTTP/1.1 {status}\r\ncontent-type: text/event-stream\r\n\r\n".encode()
            )
            for piece in answers[body["input_ids"][0]]:
                time.sleep(0.01)
                connection.sendall(piece)

    def accept(listener: socket.socket) -> None:
        for _ in answers:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]


def bodies(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [i], "stream": True} for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_timed_whatever_way_the_bytes_are_cut(seed: int) -> None:
    draw = random.Random(seed)
    answers: dict[int, list[bytes]] = {}
    for i in range(3):
        told = b"".join(event(n) for n in (1, 2, 5)) + b"data: [DONE]\n\n"
        cuts = sorted(draw.sample(range(1, len(told)), 6))
        answers[i] = [told[a:b] for a, b in zip([0, *cuts], [*cuts, len(told)], strict=True)]
    with serving(answers) as port:
        streams = stream_together(port, bodies(3))
    for stream in streams:
        assert len(stream.times) == 5
        assert stream.times == sorted(stream.times)
        assert stream.times[2] == stream.times[4]  # of one event
        assert stream.times[0] >= 0.01 and stream.times[-1] < 5


def test_answers_are_told_apart_and_wait_for_none() -> None:
    answers = {0: [event(1)], 1: [b": still\n\n"] * 20 + [event(1), event(2)]}
    with serving(answers) as port:
        short, long = stream_together(port, bodies(2))
    assert (len(short.times), len(long.times)) == (1, 2)
    assert short.times[0] + 0.1 < long.times[0]


def test_an_error_is_raised() -> None:
    late = {0: [event(1), event(1, error={"message": "no room"})]}
    with serving(late) as port, pytest.raises(RuntimeError, match="no room"):
        stream_together(port, bodies(1))


def test_a_refusal_is_raised() -> None:
    said = {0: [b'{"error": "input_ids"}']}
    with serving(said, "400 Bad Request") as port, pytest.raises(RuntimeError, match="input_ids"):
        stream_together(port, bodies(1))


def test_a_silent_server_is_an_error() -> None:
    with serving({0: [b""] * 100}) as port, pytest.raises(TimeoutError):
        stream_together(port, bodies(1), timeout=0.2)

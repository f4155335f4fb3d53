"""Bad requests of every kind: each has one answer, and a canary stream goes on unchanged."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test.kit.bad_input import CASES, CHAT, TEXT, USER
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|/usr/|/root/|site-packages|\.py\b")


@pytest.fixture(scope="module")
def live(tokenizer_directory: Path) -> Iterator[LiveServer]:
    with LiveServer(tokenizer_directory, lambda: FakeEngine(delay_s=0.002)) as server:
        yield server


class Canary:
    """A stream that must come out as it should, whatever else goes on."""

    TEXT = "The canary sings. "

    def __init__(self, live: LiveServer) -> None:
        self._live = live
        self._stop = threading.Event()
        self.rounds = 0
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._sing)

    def _sing(self) -> None:
        count = len(self._live.manager.tokenizer.encode(self.TEXT)) * 3
        with httpx.Client(base_url=self._live.url, timeout=20) as client:
            while not self._stop.is_set():
                body = {"prompt": self.TEXT, "max_tokens": count, "stream": True}
                with client.stream("POST", TEXT, json=body) as response:
                    data = [line[6:] for line in response.iter_lines() if line]
                text = "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1])
                if text != self.TEXT * 3 or data[-1] != "[DONE]":
                    self.failures.append(text)
                self.rounds += 1

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self.failures
        assert self.rounds >= 2


def check_error(response: httpx.Response, field: str, told: str) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, told)
    body = response.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert body["object"] == "error"
    assert body["message"] == error["message"]
    assert not LEAKS.search(response.text), response.text
    if field:
        assert str(error["param"]).startswith(field), (error, told)
        assert field.split(".")[0].split("[")[0] in error["message"], (error, told)


def test_every_kind_is_refused_and_the_canary_sings(live: LiveServer) -> None:
    waits = []
    with httpx.Client(base_url=live.url, timeout=20) as client, Canary(live) as canary:
        for path, body, field in CASES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            told = f"{path} {content[:150]!r}"
            began = time.monotonic()
            response = client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
            waits.append(time.monotonic() - began)
            check_error(response, field, told)
        while canary.rounds < 2:
            time.sleep(0.01)
        assert client.get("/health").status_code == 200
    waits.sort()
    assert len(CASES) > 300
    assert waits[len(waits) // 2] < 0.25, "refusing is cheap (the median: others use the machine)"
    assert live.manager.inflight == 0


def test_what_is_accepted_though_odd(live: LiveServer) -> None:
    """The kinds that are not errors: zero tokens, repeated keys (the last counts), NUL, unknown."""
    bodies: list[Any] = [
        {"prompt": "x", "max_tokens": 0},
        b'{"prompt": "x", "max_tokens": 99999, "max_tokens": 2}',
        {"prompt": "a\x00b", "max_tokens": 2},
        {"prompt": "x", "max_tokens": 2, "unheard_of": {"a": [1]}},
        {"prompt": "x", "max_tokens": 2, "model": "default"},
        {"prompt": "x", "max_tokens": 2, "rid": "not legal!"},
    ]
    with httpx.Client(base_url=live.url) as client:
        for body in bodies:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = client.post(
                TEXT, content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 200, response.text
            assert "not legal" not in response.text


def test_wrong_model_is_404(live: LiveServer) -> None:
    for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": USER})):
        response = httpx.post(live.url + path, json={**body, "model": "gpt-5"})
        assert response.status_code == 404
        check_error(response, "model", path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_content_types(live: LiveServer, headers: dict[str, str], status: int) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    response = httpx.post(live.url + TEXT, content=body, headers=headers)
    assert response.status_code == status


def test_unknown_paths_and_methods(live: LiveServer) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/", 404),
    ):
        response = httpx.request(method, live.url + path)
        assert response.status_code == status, path
        check_error(response, "", path)


def test_bodies_are_bounded(live: LiveServer) -> None:
    limit = live.manager.limits.max_body_bytes
    head = {"content-type": "application/json"}
    response = httpx.post(live.url + TEXT, content=b'"' + b"x" * limit + b'"', headers=head)
    assert response.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(limit // 65536 + 20):
            yield b"x" * 65536

    response = httpx.post(live.url + TEXT, content=endless(), headers=head)
    assert response.status_code == 413
    check_error(response, "", "endless")


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100 + b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
    ],
)
def test_heads_are_bounded(live: LiveServer, request_head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        connection.sendall(request_head)
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
    assert received.startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_five_megabytes_do_not_stop_the_loop(tokenizer_directory: Path) -> None:
    """A body of 5 MB is read, decoded, its prompt tokenized and answered; /livez goes on."""
    text = 'The lazy dog jumps over the naïve fox, [and] {so} \\ "on". ' * 17_000
    answer: list[httpx.Response] = []

    def roomy() -> FakeEngine:
        return FakeEngine(max_total_tokens=4_000_000)

    def send(url: str) -> None:
        body = {"prompt": text, "max_tokens": 1, "metadata": {"note": text * 4}}
        answer.append(httpx.post(url + TEXT, json=body, timeout=60))

    waits = []
    with (
        LiveServer(tokenizer_directory, roomy, context_length=4_000_000) as live,
        httpx.Client(base_url=live.url, timeout=20) as client,
    ):
        client.get("/livez")
        thread = threading.Thread(target=send, args=(live.url,))
        thread.start()
        while thread.is_alive():
            began = time.monotonic()
            assert client.get("/livez").status_code == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.005)
        thread.join()
    assert len(text) * 5 > 4_900_000
    assert answer[0].status_code == 200, answer[0].text
    assert answer[0].json()["usage"]["prompt_tokens"] > 400_000
    waits.sort()
    assert waits[int(len(waits) * 0.99)] < 0.5, waits[-5:]
    assert waits[-1] < 2.0


def test_mutated_bytes_do_not_hurt(live: LiveServer) -> None:
    """Requests with bytes changed, cut, doubled: whatever is answered, the server goes on."""
    rng = random.Random(7)
    body = b'{"prompt": "x", "max_tokens": 2, "stream": true}'
    good = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with Canary(live):
        for _ in range(400):
            data = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                match rng.randrange(4):
                    case 0:
                        data[at] = rng.randrange(256)
                    case 1:
                        del data[at : at + rng.randrange(20)]
                    case 2:
                        data[at:at] = data[at : at + rng.randrange(40)] * rng.randrange(4)
                    case _:
                        data += good
                data = data or bytearray(b"x")
            with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
                connection.sendall(data)
                if rng.random() < 0.5:
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(4096)
    assert httpx.get(f"{live.url}/health").status_code == 200
    end = time.monotonic() + 5
    while live.manager.inflight:
        assert time.monotonic() < end
        time.sleep(0.01)

"""One streamed answer of ``/v1/chat/completions``, as typed events; only the standard library."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

_PREFILL = re.compile(r"^: prefill (\d+)/(\d+)$")


class ChatError(Exception):
    """The server refused, could not be reached, or ended an answer with an error."""


@dataclass(frozen=True)
class Prefilled:
    """How many tokens of the prompt are computed, and how many there are."""

    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """Why an answer ended, and what it counted.

    Attributes:
        reason: ``stop`` or ``length``.
        cached_tokens: of the prompt, found in the prefix cache.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Event = Prefilled | Text | Ended


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, and who asks."""

    url: str
    api_key: str = ""

    def answer(
        self, messages: Sequence[Mapping[str, str]], **options: Any
    ) -> Generator[Event, None, None]:
        """Ask, and yield events as they come; closing the iterator ends the request.

        Args:
            messages: of OpenAI's shape, ``role`` and ``content``.
            options: further fields of the request's body.

        Raises:
            ChatError: with what the server said of it.
        """
        fields = {"messages": list(messages), "stream": True, **options}
        fields["stream_options"] = {"include_usage": True}
        connection = self._connect()
        try:
            yield from _events(_lines(self._send(connection, json.dumps(fields))))
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self.url}: {error}") from error
        finally:
            connection.close()

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url if "//" in self.url else f"http://{self.url}")

    def _connect(self) -> http.client.HTTPConnection:
        parts = self._parts
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{self.url!r} is not the address of a server, http://HOST:PORT")
        if parts.scheme == "https":
            return http.client.HTTPSConnection(parts.hostname, parts.port)
        return http.client.HTTPConnection(parts.hostname, parts.port)

    def _send(self, connection: http.client.HTTPConnection, body: str) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        base = self._parts.path.rstrip("/").removesuffix("/v1")
        connection.request("POST", f"{base}/v1/chat/completions", body.encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ChatError(_complaint(response.status, response.read()))
        return response


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        if text := line.decode("utf-8").rstrip("\r\n"):
            yield text


def _events(lines: Iterator[str]) -> Iterator[Event]:
    reason: str | None = None
    usage: dict[str, Any] | None = None
    for line in lines:
        if found := _PREFILL.match(line):
            yield Prefilled(int(found[1]), int(found[2]))
        elif line.startswith("data: ") and line != "data: [DONE]":
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                if text := choice["delta"].get("content"):
                    yield Text(text)
    if reason is None or usage is None:
        raise ChatError("the connection ended before the answer did")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    yield Ended(reason, usage["prompt_tokens"], cached, usage["completion_tokens"])


def _complaint(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode('utf-8', 'replace')}"

"""Programs against a server over HTTP: SPS, or SGLang."""

from __future__ import annotations

import contextlib
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from sps_runtime.lang.backend import Backend


class ServerError(RuntimeError):
    """A server refused or failed; the first argument is what it said.

    Attributes:
        status: of HTTP; None for an error inside of a stream.
    """

    def __init__(self, said: object, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status


class RuntimeEndpoint(Backend):
    """A server at `base_url`.

    Args:
        base_url: such as ``http://127.0.0.1:30000``.
        api_key: sent as a bearer token.
        verify: a file of certificates to trust, for https.
        chat_template_name: instead of the one that the model's name says.
        timeout_s: until a silent server counts as gone; a long prompt may take minutes.

    Attributes:
        model_info: what the server says about its model.

    Raises:
        ServerError: it does not answer as such a server does.
        OSError: nobody answers.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._tls = ssl.create_default_context(cafile=verify) if verify else None
        self._timeout_s = timeout_s
        self.model_info: dict[str, Any] = self._call("/get_model_info")
        super().__init__(self.model_info["model_path"], chat_template_name)

    def ask(self, body: dict[str, Any]) -> Any:
        return self._call("/generate", body)

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open("/generate", {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield _unless_error(json.loads(data))
        raise ServerError("the stream ended too early: the server has gone")

    def flush_cache(self) -> None:
        self._call("/flush_cache", {})

    def get_server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._call("/get_server_info")
        return info

    def start_profile(self) -> None:
        self._call("/start_profile")

    def stop_profile(self) -> None:
        self._call("/stop_profile")

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to POST `body`, or to GET without one: JSON, else text."""
        with self._open(path, body) as response:
            return _json_or_text(response.read())

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout_s, context=self._tls)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                raise ServerError(_json_or_text(error.read()), error.code) from None


def _json_or_text(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _unless_error(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise ServerError(event)
    return event

"""Former responses, in memory and bounded: what ``previous_response_id`` goes on from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from sps_runtime.types.errors import InvalidRequest

MAX_CHARS = 64 << 20
MAX_RESPONSES = 4096


@dataclass(frozen=True)
class StoredResponse:
    """Attributes:
    messages: the whole conversation, instructions aside, as chat templates take it.
    content: the response as it was answered.
    chars: its share of the bound.
    """

    messages: tuple[dict[str, Any], ...]
    content: dict[str, Any]
    chars: int


class ResponseStore:
    """The newest responses; each owner sees his own."""

    def __init__(self, max_chars: int = MAX_CHARS, max_responses: int = MAX_RESPONSES) -> None:
        self._max_chars = max_chars
        self._max_responses = max_responses
        self._found: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._chars = 0

    def put(self, owner: str, response_id: str, response: StoredResponse) -> None:
        """Keep a response; the oldest go where there is no room."""
        self._found[owner, response_id] = response
        self._chars += response.chars
        while self._chars > self._max_chars or len(self._found) > self._max_responses:
            self._chars -= self._found.popitem(last=False)[1].chars

    def get(self, owner: str, response_id: str, *, field: str, status: int) -> StoredResponse:
        """Return a response.

        Raises:
            InvalidRequest: with this field and status when it is not there (any more).
        """
        found = self._found.get((owner, response_id))
        if found is None:
            raise InvalidRequest(
                f"{field}: there is no such response (any more)",
                field=field,
                status=status,
                code="previous_response_not_found" if status == 400 else "response_not_found",
            )
        return found

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response that is there."""
        self._chars -= self._found.pop((owner, response_id)).chars

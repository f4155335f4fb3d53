"""What penalties see: every distinct id so far, and how often it was generated."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class History:
    """Counts per distinct id, kept packed so that a plan costs a copy and no loop."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._index = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = array("i", self._index)
        self._counts = array("i", bytes(4 * len(self._ids)))

    def generated(self, token: int) -> None:
        """Count one generated token."""
        place = self._index.get(token)
        if place is None:
            place = self._index[token] = len(self._ids)
            self._ids.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def packed(self) -> tuple[bytes, bytes]:
        """(ids, counts) as `SamplePlan` carries them."""
        return self._ids.tobytes(), self._counts.tobytes()

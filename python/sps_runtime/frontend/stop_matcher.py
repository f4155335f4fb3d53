"""Stop strings over streamed text, across chunk borders."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text that can no longer be part of a stop string, and finds the first one.

    The first match is the one that *ends* first (the longest of those ending there), which does not
    depend on how the text was cut into chunks.

    Args:
        stops: nonempty strings.
        keep: release the matched string too instead of trimming it.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take `text`; return (what may be shown, the matched stop string or None).

        After a match nothing more must be pushed.
        """
        buffer = self._held + text
        if match := self._first_match(buffer):
            start, end = match
            self._held = ""
            return buffer[: end if self._keep else start], buffer[start:end]
        hold = max((_open_suffix(buffer, stop) for stop in self._stops), default=0)
        cut = len(buffer) - hold
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """Return what is still held: the text has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, int] | None:
        found = []
        for stop in self._stops:
            at = buffer.find(stop)
            if at >= 0:
                found.append((at + len(stop), at))
        if not found:
            return None
        end, start = min(found)
        return start, end


def _open_suffix(buffer: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that ends `buffer`."""
    at = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(buffer[at:]):
            return len(buffer) - at
        at = buffer.find(stop[0], at + 1)
    return 0

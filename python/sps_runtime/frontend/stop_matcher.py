"""Stop strings and expressions over streamed text, across chunk borders."""

from __future__ import annotations

from collections.abc import Sequence

from sps_runtime.frontend.regex_program import Program
from sps_runtime.frontend.regex_search import RegexSearch


class StopMatcher:
    """Releases text that can no longer be part of a match, and finds the first one.

    The first match is the one that *ends* first (the longest of those ending there), which does not
    depend on how the text was cut into chunks.

    Args:
        stops: nonempty strings.
        keep: release the matched text too instead of trimming it.
        regexes: expressions that stop as well.
    """

    def __init__(
        self, stops: Sequence[str], *, keep: bool = False, regexes: Program | None = None
    ) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._search = RegexSearch(regexes) if regexes is not None else None
        self._held = ""
        self._released = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Take `text`; return (what may be shown, the stop string or expression that matched).

        After a match nothing more must be pushed.
        """
        buffer = self._held + text
        if match := self._first_match(buffer, len(self._held)):
            end, start, stop = match
            self._held = ""
            return buffer[: end if self._keep else start], stop
        hold = max((_open_suffix(buffer, stop) for stop in self._stops), default=0)
        cut = len(buffer) - hold
        if self._search is not None:
            cut = min(cut, self._search.open_from - self._released)
        self._held = buffer[cut:]
        self._released += cut
        return buffer[:cut], None

    def flush(self) -> str:
        """Return what is still held: the text has ended without completing a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, known: int) -> tuple[int, int, str] | None:
        """(end, start, what matched) in the buffer, of which `known` characters were there."""
        found = []
        for stop in self._stops:
            at = buffer.find(stop)
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if self._search is not None:
            end = min(found)[0] if found else len(buffer)
            match = self._search.feed(buffer[known:end])
            if match is not None:
                here = self._released
                found.append((match.end - here, match.start - here, match.pattern))
        return min(found, default=None)


def _open_suffix(buffer: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that ends `buffer`."""
    at = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(buffer[at:]):
            return len(buffer) - at
        at = buffer.find(stop[0], at + 1)
    return 0

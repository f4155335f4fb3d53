"""Finding markers in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Collection


def first_marker(text: str, markers: Collection[str]) -> tuple[int, str] | None:
    """The first place of any marker, and which; the longest of those at one place."""
    places = [(text.find(marker), -len(marker), marker) for marker in markers]
    found = [place for place in places if place[0] >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def settled(text: str, markers: Collection[str]) -> int:
    """How much of `text` no marker can reach back into: blanks at its end, and what may be the
    beginning of a marker, are not settled."""
    length = len(text)
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), 0, -1):
            if text.endswith(marker[:size]):
                length = min(length, len(text) - size)
                break
    return len(text[:length].rstrip())

"""Ids to text, incrementally: whatever the chunks, the deltas join to the same text.

`ByteDecoder` is exact for byte-level and sentencepiece-like vocabularies and holds at most three
bytes back. `WindowDecoder` serves the other decoders by the prefix/read offsets of vLLM and SGLang,
with a bound on what it holds (an endless run of undecodable tokens would otherwise be decoded again
for every token).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sps_runtime.frontend.regex_program import Program
from sps_runtime.frontend.stop_matcher import StopMatcher

REPLACEMENT = "\ufffd"
MAX_WINDOW_TOKENS = 16


class IncrementalDecoder(Protocol):
    """Text of a growing id sequence."""

    def push(self, ids: Iterable[int]) -> str:
        """Take `ids` and return the text that is settled by now."""
        ...

    def finish(self) -> str:
        """Return the text of what is still pending; the sequence has ended."""
        ...


class ByteDecoder:
    """Decodes by each token's bytes and an incremental UTF-8 decoder.

    An invalid byte sequence becomes U+FFFD per maximal subpart (Unicode's recommended practice).

    Args:
        spell: the bytes of one id.
        skip: ids without text.
    """

    def __init__(self, spell: Callable[[int], bytes], skip: Collection[int] = ()) -> None:
        self._spell = spell
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        skip = self._skip
        return self._utf8.decode(b"".join([self._spell(i) for i in ids if i not in skip]))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """Decodes a short window again with every token and returns what was added.

    Args:
        decode: text of an id sequence, special tokens already treated as wanted.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join([self._push_one(token) for token in ids])

    def _push_one(self, token: int) -> str:
        self._pending.append(token)
        return self._settle(force=len(self._pending) >= MAX_WINDOW_TOKENS)

    def _settle(self, *, force: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) and not force:
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]

    def finish(self) -> str:
        return self._settle(force=True) if self._pending else ""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens added.

    Attributes:
        text: characters that may be shown now.
        used: how many of the pushed tokens count; fewer than pushed after a match.
        matched: the stop string or expression that the last used token completed, or None.
    """

    text: str
    used: int
    matched: str | None = None


class TextStream:
    """The text of one sequence: decoder and stop strings together.

    Args:
        decoder: a fresh decoder.
        stops: stop strings, perhaps none.
        keep_stop: show the text that matched.
        regexes: expressions that end the text as well.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        regexes: Program | None = None,
    ) -> None:
        self._decoder = decoder
        wanted = stops or regexes is not None
        self._matcher = StopMatcher(stops, keep=keep_stop, regexes=regexes) if wanted else None

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Take newly generated ids. Nothing may be pushed after a match."""
        if self._matcher is None:
            return TextDelta(self._decoder.push(ids), len(ids))
        shown = []
        for used, token in enumerate(ids, 1):  # one by one: a match ends at its own token
            text, matched = self._matcher.push(self._decoder.push((token,)))
            shown.append(text)
            if matched is not None:
                return TextDelta("".join(shown), used, matched)
        return TextDelta("".join(shown), len(ids))

    def finish(self) -> str:
        """Return what was held back; the sequence has ended without a stop string."""
        tail = self._decoder.finish()
        if self._matcher is None:
            return tail
        text, matched = self._matcher.push(tail) if tail else ("", None)
        return text if matched is not None else text + self._matcher.flush()

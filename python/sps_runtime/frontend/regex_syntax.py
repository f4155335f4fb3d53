"""Python's syntax of regular expressions, read into a tree."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_DEPTH = 32
MAX_REPEAT = 1000
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|0[0-7]{0,2}|[0-3][0-7]{2}"
    r"|[dDwWsSafnrtv]|[^A-Za-z0-9])",
    re.DOTALL,
)
_REPEAT = re.compile(r"\{(\d{0,9})(?:(,)(\d{0,9}))?\}")
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_GROUP = re.compile(r"\((?:\?(?::|P<[^\W\d]\w*>|([aimsu]+):))?")
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_AHEAD = {"$": "$", "\\Z": "\\Z", "\\z": "\\z", "\\b": "\\b", "\\B": "\\B"}
_FLAG_OF = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "u": re.UNICODE}


class RegexError(ValueError):
    """An expression that is wrong, or asks for what is not possible here."""


@dataclass(frozen=True)
class Char:
    """One character that passes the test."""

    test: Callable[[str], bool]


@dataclass(frozen=True)
class Start:
    """The start of the text, or of a line."""

    line: bool


@dataclass(frozen=True)
class Row:
    """One after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of several."""

    ways: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """`least` to `most` times; None for any number."""

    node: Node
    least: int
    most: int | None


Node = Char | Start | Row | Choice | Repeat


class Parser:
    """Reads one expression, by recursive descent."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        """The expression's tree. Raises RegexError."""
        flags = re.RegexFlag(0)
        while found := _FLAGS.match(self._source, self._at):
            flags |= _flags_of(found[1])
            self._at = found.end()
        node = self._choice(flags)
        if self._at < len(self._source):
            raise RegexError("has an unbalanced )")
        return node

    def _choice(self, flags: re.RegexFlag) -> Node:
        ways = [self._row(flags)]
        while self._take("|"):
            ways.append(self._row(flags))
        return ways[0] if len(ways) == 1 else Choice(tuple(ways))

    def _row(self, flags: re.RegexFlag) -> Node:
        parts: list[Node] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            if comment := _COMMENT.match(self._source, self._at):
                self._at = comment.end()
                continue
            parts.append(self._repeated(self._atom(flags)))
        return Row(tuple(parts))

    def _repeated(self, node: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        if isinstance(node, Start):
            raise RegexError("repeats what has no length")
        least, most = bounds
        if most is not None and most < least:
            raise RegexError("repeats at most less often than at least")
        if max(least, most or 0) > MAX_REPEAT:
            raise RegexError(f"repeats more than {MAX_REPEAT} times")
        if self._take("+"):
            raise RegexError("has a possessive repetition, which is not supported")
        self._take("?")  # lazy or greedy: where a match ends first does not depend on it
        if self._bounds() is not None:
            raise RegexError("repeats a repetition")
        return Repeat(node, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        """The repetition that stands here, if one does."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        found = _REPEAT.match(self._source, self._at)
        if found is None or found[0] == "{}":
            return None
        self._at = found.end()
        least = int(found[1] or 0)
        if not found[2]:
            return least, least
        return least, int(found[3]) if found[3] else None

    def _atom(self, flags: re.RegexFlag) -> Node:
        source, at = self._source, self._at
        if source[at] == "(":
            return self._group(flags)
        if source[at] == "[":
            return Char(_class_test(self._class(), flags))
        if source[at] == "\\":
            return self._escape(flags)
        if source[at] in "*+?":
            raise RegexError("repeats nothing")
        self._at += 1
        if source[at] == "$":
            raise _unknowable("$")
        if source[at] == "^":
            return Start(line=bool(flags & re.MULTILINE))
        if source[at] == ".":
            return Char(_anything if flags & re.DOTALL else _no_newline)
        return Char(_literal_test(source[at], flags))

    def _group(self, flags: re.RegexFlag) -> Node:
        found = _GROUP.match(self._source, self._at)
        assert found is not None
        if found[0] == "(" and self._source.startswith("(?", self._at):
            raise RegexError("has a group of a kind that is not supported: look-around and such")
        self._at = found.end()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise RegexError(f"is nested deeper than {MAX_DEPTH} levels")
        node = self._choice(flags | _flags_of(found[1] or ""))
        if not self._take(")"):
            raise RegexError("has an unbalanced (")
        self._depth -= 1
        return Row((node,)) if isinstance(node, Start) else node

    def _class(self) -> str:
        """The text of the class that begins here."""
        source, end = self._source, self._at + 1
        if source.startswith("^", end):
            end += 1
        if source.startswith("]", end):
            end += 1
        while end < len(source) and source[end] != "]":
            end += 2 if source[end] == "\\" else 1
        if end >= len(source):
            raise RegexError("has an unbalanced [")
        text = source[self._at : end + 1]
        self._at = end + 1
        return text

    def _escape(self, flags: re.RegexFlag) -> Node:
        two = self._source[self._at : self._at + 2]
        if two in _AHEAD:
            raise _unknowable(two)
        if two == "\\A":
            self._at += 2
            return Start(line=False)
        found = _ESCAPE.match(self._source, self._at)
        if found is None:
            raise RegexError(f"has the escape {two}, which is none or not supported")
        self._at = found.end()
        return Char(_class_test(f"[{found[0]}]", flags))

    def _take(self, sign: str) -> bool:
        taken = self._source.startswith(sign, self._at)
        self._at += len(sign) * taken
        return taken


def _flags_of(letters: str) -> re.RegexFlag:
    flags = re.RegexFlag(0)
    for letter in letters:
        flags |= _FLAG_OF[letter]
    return flags


def _unknowable(sign: str) -> RegexError:
    return RegexError(f"has {sign}, which depends on what follows: a stream does not know it")


def _anything(char: str) -> bool:
    return True


def _no_newline(char: str) -> bool:
    return char != "\n"


def _cases(char: str) -> set[str]:
    """A character in upper and in lower case, as far as these are single characters."""
    return {case for case in (char, char.lower(), char.upper()) if len(case) == 1}


def _literal_test(literal: str, flags: re.RegexFlag) -> Callable[[str], bool]:
    if not flags & re.IGNORECASE:
        return literal.__eq__
    cases = _cases(literal)
    return lambda char: not cases.isdisjoint(_cases(char))


def _class_test(text: str, flags: re.RegexFlag) -> Callable[[str], bool]:
    """The test of a class by Python's engine, one character at a time."""
    try:
        match = re.compile(text, flags & re.ASCII).fullmatch
    except (re.error, OverflowError) as error:
        raise RegexError(f"has a class that is none: {error}") from None
    if not flags & re.IGNORECASE:
        return lambda char: match(char) is not None
    every = all if text.startswith("[^") else any
    return lambda char: every(match(case) is not None for case in _cases(char))

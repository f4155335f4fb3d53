"""What a piece of an answer's text turns out to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thinking aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """What is said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call whose function is known.

    Attributes:
        index: of the call in its answer.
        id: made up by the server.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Event = Reasoning | Text | CallBegin | CallArguments
"""Adjacent pieces of one kind mean the same as their concatenation."""

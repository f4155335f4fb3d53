"""The first match of regular expressions in a text that comes piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.frontend.regex_program import Accept, Guard, Program, Split, Take


@dataclass(frozen=True, slots=True)
class RegexMatch:
    """Characters [start, end) of the text, and whose match it is."""

    start: int
    end: int
    pattern: str


class RegexSearch:
    """Runs a program over a text, all attempts in lockstep (Thompson 1968, Pike's `sam`).

    The first match is the one that *ends* first, the longest of those ending there; it does not
    depend on how the text was cut. An attempt is one state, reached from one start: of two in the
    same state the one that started earlier is kept, so there are never more than states.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._position = 0
        self._previous = ""
        self._attempts: list[tuple[int, int]] = []
        """(state that takes a character, start), by ascending start."""

    @property
    def open_from(self) -> int:
        """The first character that may still be part of a match."""
        return self._attempts[0][1] if self._attempts else self._position

    def feed(self, text: str) -> RegexMatch | None:
        """Take `text`; the first match, if there is one. Nothing may be fed after it."""
        for char in text:
            found = self._step(char)
            if found is not None:
                return found
        return None

    def _step(self, char: str) -> RegexMatch | None:
        states, position = self._program.states, self._position
        attempts, seen = self._attempts, {state for state, _ in self._attempts}
        self._go_on(self._program.entry, position, attempts, seen)
        self._position, self._previous = position + 1, char
        followers: list[tuple[int, int]] = []
        reached: set[int] = set()
        for number, start in attempts:
            state = states[number]
            assert isinstance(state, Take)
            if not state.test(char):
                continue
            pattern = self._go_on(state.next, start, followers, reached)
            if pattern is not None:
                return RegexMatch(start, position + 1, self._program.patterns[pattern])
        self._attempts = followers
        return None

    def _go_on(
        self, entry: int, start: int, attempts: list[tuple[int, int]], seen: set[int]
    ) -> int | None:
        """Add the attempts that begin in `entry` here; the expression that is complete, if any."""
        states, waiting = self._program.states, [entry]
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            state = states[number]
            if isinstance(state, Take):
                attempts.append((number, start))
            elif isinstance(state, Split):
                waiting += state.ways
            elif isinstance(state, Accept):
                return state.pattern
            elif self._holds(state):
                waiting.append(state.next)
        return None

    def _holds(self, guard: Guard) -> bool:
        return self._position == 0 or (guard.line and self._previous == "\n")

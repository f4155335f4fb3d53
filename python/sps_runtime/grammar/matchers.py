"""A rank's matchers: a cache, never a state.

A plan carries the grammar and every token generated so far, so a matcher can always be made anew;
the last one of each board slot is kept because it usually lacks one token only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sps_runtime.grammar.protocol import Allowed, GrammarBackend, Matcher
from sps_runtime.types.tokens import unpack_ids

COMPILED = 64
"""Grammars kept compiled, the least recently used goes first."""


@dataclass
class _Running:
    grammar: str
    generated: bytes
    matcher: Matcher


class Matchers:
    """Answers which tokens a sequence may have next.

    Args:
        make: makes the backend, when the first grammar comes.
        slots: sequences whose matchers are kept.
    """

    def __init__(self, make: Callable[[], GrammarBackend], slots: int = 512) -> None:
        self._make = make
        self._slots = slots
        self._backend: GrammarBackend | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._running: OrderedDict[int, _Running] = OrderedDict()

    def allowed(self, slot: int, grammar: str, generated: bytes) -> Allowed:
        """What may follow the tokens generated so far.

        Args:
            slot: the sequence's board slot: a hint where to look, nothing else.
            grammar: as `GrammarBackend.prepare` made it.
            generated: packed int32 ids.

        Raises:
            GrammarError: nothing may follow, or the tokens are not the grammar's.
        """
        running = self._running.pop(slot, None)
        if (
            running is None
            or running.grammar != grammar
            or not generated.startswith(running.generated)
        ):
            running = _Running(grammar, b"", self._fresh(grammar))
        running.matcher.accept(unpack_ids(generated[len(running.generated) :]))
        running.generated = generated
        allowed = running.matcher.allowed()
        self._running[slot] = running
        while len(self._running) > self._slots:
            self._running.popitem(last=False)
        return allowed

    def _fresh(self, grammar: str) -> Matcher:
        if self._backend is None:
            self._backend = self._make()
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._backend.matcher(grammar)
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > COMPILED:
            self._compiled.popitem(last=False)
        return compiled.copy()


def without(allowed: Allowed, forbidden: Collection[int]) -> Allowed:
    """`allowed` without forbidden ids, unless none is left then: a grammar's word is the last."""
    if not forbidden:
        return allowed
    kept = allowed.copy()
    kept[list(forbidden)] = False
    return kept if kept.any() else allowed

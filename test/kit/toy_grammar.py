"""A grammar over ids, without any library: what may come next depends on every id before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sps_runtime.grammar.protocol import Allowed, GrammarError
from sps_runtime.types.grammar import GrammarSpec


class ToyGrammars:
    """Grammars by number: under "k" every id is congruent to the sum of all before it, modulo k,
    and an answer may end where that sum is even. "dead N" allows nothing after N ids."""

    def __init__(self, vocab: int, eos: int) -> None:
        self._vocab = vocab
        self._eos = eos

    def prepare(self, spec: GrammarSpec) -> str:
        return spec.source

    def matcher(self, prepared: str) -> ToyMatcher:
        return ToyMatcher(prepared, self._vocab, self._eos)


class ToyMatcher:
    def __init__(self, grammar: str, vocab: int, eos: int, ids: Sequence[int] = ()) -> None:
        self._grammar, self._vocab, self._eos = grammar, vocab, eos
        self._ids = list(ids)

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not self.allowed()[token]:
                raise GrammarError("no such token here")
            self._ids.append(token)

    def allowed(self) -> Allowed:
        allowed = np.zeros(self._vocab, np.bool_)
        if self._eos in self._ids:
            allowed[self._eos] = True
            return allowed
        if self._grammar.startswith("dead"):
            if len(self._ids) >= int(self._grammar.split()[1]):
                raise GrammarError("nothing may follow")
            return ~allowed
        total, modulus = sum(self._ids), int(self._grammar)
        allowed[total % modulus :: modulus] = True
        allowed[self._eos] = total % 2 == 0
        return allowed

    def copy(self) -> ToyMatcher:
        return ToyMatcher(self._grammar, self._vocab, self._eos, self._ids)

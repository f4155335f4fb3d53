"""The cache of matchers never shows: every answer equals that of a fresh one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test.kit.toy_grammar import ToyGrammars

from sps_runtime.grammar.matchers import Matchers, without
from sps_runtime.grammar.protocol import GrammarError
from sps_runtime.types.tokens import pack_ids

VOCAB, EOS = 50, 3


def test_random_use_equals_fresh_matchers() -> None:
    """Slots change hands, sequences go back, skip ahead and branch."""
    chance = random.Random(0)
    toys = ToyGrammars(VOCAB, EOS)
    matchers = Matchers(lambda: toys, slots=3)
    paths: dict[int, tuple[str, list[int]]] = {}
    for _ in range(2000):
        slot = chance.randrange(6)
        grammar, ids = paths.get(slot, ("2", []))
        if chance.random() < 0.1 or EOS in ids:
            grammar, ids = chance.choice(["2", "5", "7"]), []
        elif chance.random() < 0.1:
            ids = ids[: chance.randrange(len(ids) + 1)]
        fresh = toys.matcher(grammar)
        fresh.accept(ids)
        assert np.array_equal(matchers.allowed(slot, grammar, pack_ids(ids)), fresh.allowed())
        for _ in range(chance.randrange(3)):
            choice = chance.choice(np.flatnonzero(fresh.allowed()).tolist())
            fresh.accept([choice])
            ids = [*ids, choice]
            if choice == EOS:
                break
        paths[slot] = (grammar, ids)


def test_an_error_leaves_nothing_behind() -> None:
    matchers = Matchers(lambda: ToyGrammars(VOCAB, EOS))
    with pytest.raises(GrammarError):
        matchers.allowed(0, "5", pack_ids([1]))
    assert matchers.allowed(0, "5", pack_ids([5])).any()


def test_the_backend_is_made_once_and_late() -> None:
    made = []

    def make() -> ToyGrammars:
        made.append(1)
        return ToyGrammars(VOCAB, EOS)

    matchers = Matchers(make)
    assert not made
    for slot in range(5):
        matchers.allowed(slot, "7", b"")
    assert made == [1]


def test_a_grammars_word_is_the_last() -> None:
    allowed = np.array([True, True, False])
    assert without(allowed, ()).tolist() == [True, True, False]
    assert without(allowed, (0,)).tolist() == [False, True, False]
    assert without(allowed, (0, 1)).tolist() == [True, True, False]
    assert allowed.tolist() == [True, True, False]

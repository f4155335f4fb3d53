"""Going through a grammar token by token: a text, or what random logits prefer."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from sps_runtime.frontend.token_bytes import speller
from sps_runtime.grammar.protocol import GrammarBackend, Matcher
from sps_runtime.types.grammar import GrammarSpec
from test.kit.random_grammars import Case, random_case
from test.kit.tokenizers import byte_level_tokenizer

EOS = 2
TOKENIZER = byte_level_tokenizer()


def start(backend: GrammarBackend, kind: str, source: str) -> Matcher:
    return backend.matcher(backend.prepare(GrammarSpec(kind, source)))  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def accepts(backend: GrammarBackend, kind: str, source: str, text: str) -> bool:
    """Whether the whole text is an answer: every token allowed, and the end after the last."""
    matcher = start(backend, kind, source)
    for token in ids(text):
        if not matcher.allowed()[token]:
            return False
        matcher.accept([token])
    return bool(matcher.allowed()[EOS])


def random_answer(backend: GrammarBackend, size: int, seed: int, longest: int) -> Case:
    """Whatever random logits over `size` ids prefer, an answer follows its random grammar and ends;
    the case that was tried."""
    spell = _spelling()
    case, noise = random_case(random.Random(seed)), np.random.default_rng(seed)
    matcher, output = backend.matcher(backend.prepare(case.spec)), list[int]()
    while len(output) < longest:
        logits = np.where(matcher.allowed(), noise.normal(size=size), -np.inf)
        token = int(logits.argmax())
        if token == EOS:
            break
        output.append(token)
        matcher.accept([token])
    else:
        raise AssertionError(f"seed {seed}: no end: {case.spec}")
    text = b"".join(map(spell, output)).decode()
    assert case.holds(text), f"seed {seed}: {text!r} violates {case.spec}"
    return case


def _spelling() -> Callable[[int], bytes]:
    spell = speller({"type": "ByteLevel"})
    assert spell is not None
    return lambda token: spell(TOKENIZER.id_to_token(token))

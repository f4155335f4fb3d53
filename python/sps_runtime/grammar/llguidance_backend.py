"""Grammars by llguidance (https://github.com/guidance-ai/llguidance): Earley parsing over a lexer
of derivatives, masks from a walk over the vocabulary's trie; limits bound every step."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sps_runtime.grammar.ebnf import to_lark
from sps_runtime.grammar.json_pieces import guided_schema, schema_object
from sps_runtime.grammar.protocol import Allowed, GrammarError, Vocabulary, one_line
from sps_runtime.grammar.structural_tag import structural_tag_to_lark
from sps_runtime.types.grammar import GrammarSpec

_ESCAPE = re.compile(r"\\.", re.DOTALL)


class LLGuidance:
    """The backend of one vocabulary.

    Raises:
        GrammarError: when the tokenizer is of a kind that llguidance does not take.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._size = vocabulary.size
        self._eos = frozenset(vocabulary.eos_ids)
        try:
            self._tokenizer = LLTokenizer(
                vocabulary.tokenizer, n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_ids)
            )
        except Exception as error:  # the binding raises whatever Rust says
            why = one_line(str(error))
            raise GrammarError(f"this tokenizer takes no grammars: {why}") from None
        self._special = _special_tokens(vocabulary.tokenizer)
        self._limits = LLParserLimits(
            max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False
        )

    def prepare(self, spec: GrammarSpec) -> str:
        """Raises GrammarError for a grammar that does not compile, or that nothing can begin."""
        text = self._translated(spec)
        self.matcher(text).allowed()
        return text

    def matcher(self, prepared: str) -> LLGuidanceMatcher:
        inner = LLMatcher(self._tokenizer, prepared, log_level=0, limits=self._limits)
        if inner.is_error():
            raise GrammarError(one_line(inner.get_error()))
        return LLGuidanceMatcher(inner, self._size, self._eos)

    def _translated(self, spec: GrammarSpec) -> str:
        if spec.kind == "regex":
            return str(LLMatcher.grammar_from_regex(_ascii_digits(spec.source)))
        if spec.kind == "json_schema":
            schema = json.dumps(guided_schema(schema_object(spec.source)))
            return str(LLMatcher.grammar_from_json_schema(schema))
        if spec.kind == "structural_tag":
            lark = structural_tag_to_lark(spec.source, self._special)
            return str(LLMatcher.grammar_from_lark(lark))
        lark = to_lark(spec.source) if spec.kind == "ebnf" else spec.source
        return str(LLMatcher.grammar_from_lark(lark))


class LLGuidanceMatcher:
    """`protocol.Matcher` over an `LLMatcher`, which enters an error state for good.

    Where nothing can follow, an `LLMatcher` stops by itself and would take no end of sequence any
    more, so that ends are told apart here.
    """

    def __init__(
        self, inner: LLMatcher, size: int, eos: frozenset[int], ended: bool = False
    ) -> None:
        self._inner = inner
        self._size = size
        self._eos = eos
        self._ended = ended

    def accept(self, tokens: Sequence[int]) -> None:
        end = next((i for i, token in enumerate(tokens) if token in self._eos), len(tokens))
        told, rest = list(tokens[:end]), tokens[end:]
        if told and (self._ended or not self._inner.consume_tokens(told)):
            raise GrammarError(f"the grammar has no such token here: {self._error()}")
        if not rest:
            return
        if not self._ended and not self._inner.is_accepting():
            raise GrammarError("the grammar does not end here")
        if not self._eos.issuperset(rest):
            raise GrammarError("tokens follow the end")
        self._ended = True

    def allowed(self) -> Allowed:
        if self._ended:
            mask = np.zeros(self._size, np.bool_)
            mask[list(self._eos)] = True
            return mask
        packed = self._inner.compute_bitmask()
        if self._inner.is_error():
            raise GrammarError(f"the grammar cannot go on: {self._error()}")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        mask = bits[: self._size].astype(np.bool_)
        if not mask.any():
            raise GrammarError("the grammar allows no token of this model's vocabulary here")
        return mask

    def copy(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self._inner.deep_copy(), self._size, self._eos, self._ended)

    def _error(self) -> str:
        return one_line(self._inner.get_error())


def _ascii_digits(regex: str) -> str:
    r"""Read ``\d`` as 0 to 9, as xgrammar and JavaScript do.

    Unicode's 700 digits hold newer ones than the checker at the other end may know.
    """
    return _ESCAPE.sub(lambda found: "[0-9]" if found[0] == "\\d" else found[0], regex)


def _special_tokens(tokenizer: str) -> dict[str, int]:
    """Special tokens, which text cannot spell, by what they read."""
    added = msgspec.json.decode(tokenizer).get("added_tokens") or []
    return {token["content"]: token["id"] for token in added if token.get("special")}

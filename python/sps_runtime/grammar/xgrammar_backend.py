"""Grammars by xgrammar (https://github.com/mlc-ai/xgrammar, extra ``[xgrammar]``): pushdown
automata, with masks of context-independent tokens made when a grammar is compiled.

It imports torch, so it comes only when a backend is made: into the worker that compiles clients'
grammars first, and into ranks, which have torch anyhow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from sps_runtime.grammar.json_pieces import schema_object, settled_schema
from sps_runtime.grammar.protocol import Allowed, GrammarError, Vocabulary, one_line
from sps_runtime.grammar.structural_tag import structures_of
from sps_runtime.types.grammar import GrammarSpec

CACHE_BYTES = 64 << 20
WORD_BITS = 32
_CONTROL = re.compile(rb"[\x00-\x1f]")


class XGrammar:
    """The backend of one vocabulary. What ranks are given is the client's own grammar.

    Raises:
        GrammarError: xgrammar is not installed, or does not take a tokenizer of this kind.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise GrammarError("the grammar backend xgrammar is not installed") from error
        self._new_matcher = xgrammar.GrammarMatcher
        self._size = vocabulary.size
        self._eos = frozenset(vocabulary.eos_ids)
        tokens = [""] * vocabulary.size
        for token, number in Tokenizer.from_str(vocabulary.tokenizer).get_vocab().items():
            tokens[number] = token
        info = xgrammar.TokenizerInfo(
            tokens,
            getattr(xgrammar.VocabType, _kind(vocabulary.tokenizer)),
            vocab_size=vocabulary.size,
            stop_token_ids=list(vocabulary.eos_ids),
        )
        self._printable = np.array([not _CONTROL.search(token) for token in info.decoded_vocab])
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=1, cache_limit_bytes=CACHE_BYTES
        )

    def prepare(self, spec: GrammarSpec) -> str:
        """Raises GrammarError for a grammar that does not compile, or that nothing can begin."""
        text = msgspec.json.encode(spec).decode()
        self.matcher(text).allowed()
        return text

    def matcher(self, prepared: str) -> XGrammarMatcher:
        spec = msgspec.json.decode(prepared, type=GrammarSpec)
        try:
            compiled = self._compiled(spec)
        except GrammarError:
            raise
        except Exception as error:  # the binding raises whatever C++ says
            raise GrammarError(one_line(str(error))) from None
        within = self._printable if spec.kind == "json_schema" else np.ones(self._size, np.bool_)
        return XGrammarMatcher(self._new_matcher(compiled), within, self._eos)

    def _compiled(self, spec: GrammarSpec) -> Any:
        compiler = self._compiler
        if spec.kind == "regex":
            return compiler.compile_regex(spec.source)
        if spec.kind == "json_schema":
            schema = settled_schema(schema_object(spec.source))
            return compiler.compile_json_schema(schema, any_whitespace=False, strict_mode=False)
        if spec.kind == "lark":
            return compiler.compile_lark(spec.source)
        if spec.kind == "structural_tag":
            return compiler.compile_structural_tag(_triggered(spec.source))
        return compiler.compile_grammar(spec.source)


class XGrammarMatcher:
    """`protocol.Matcher` over a `GrammarMatcher`, which takes one end of sequence and no more.

    Args:
        within: ids that may come at all. xgrammar lets control characters into the strings of a
            schema, which JSON does not have.
    """

    def __init__(self, inner: Any, within: Allowed, eos: frozenset[int]) -> None:
        self._inner = inner
        self._within = within
        self._eos = eos

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self._inner.is_terminated():
                if token not in self._eos:
                    raise GrammarError("tokens follow the end")
            elif not self._inner.accept_token(token):
                raise GrammarError("the grammar has no such token here")

    def allowed(self) -> Allowed:
        size = len(self._within)
        mask = np.zeros(size, np.bool_)
        if self._inner.is_terminated():
            mask[list(self._eos)] = True
            return mask
        words = np.zeros((1, -(-size // WORD_BITS)), np.int32)
        if not self._inner.fill_next_token_bitmask(words):
            words.fill(-1)  # it leaves the mask alone where it allows everything
        mask[:] = np.unpackbits(words.view(np.uint8)[0], bitorder="little")[:size]
        mask &= self._within
        if not mask.any():
            raise GrammarError("the grammar allows no token of this model's vocabulary here")
        return mask

    def copy(self) -> XGrammarMatcher:
        return XGrammarMatcher(self._inner.fork(), self._within, self._eos)


def _kind(tokenizer: str) -> str:
    """How the tokenizer spells bytes, by its decoder: a name of xgrammar's `VocabType`."""
    decoder = msgspec.json.decode(tokenizer).get("decoder") or {}
    steps = {step["type"] for step in (decoder, *decoder.get("decoders", ())) if "type" in step}
    if "ByteLevel" in steps:
        return "BYTE_LEVEL"
    if "ByteFallback" in steps:
        return "BYTE_FALLBACK"
    raise GrammarError("this tokenizer takes no grammars: it spells no bytes")


def _triggered(source: str) -> dict[str, Any]:
    """SGLang's structural tag as xgrammar writes it."""
    structures, triggers = structures_of(source)
    tags = [
        {
            "type": "tag",
            "begin": begin,
            "content": {"type": "json_schema", "json_schema": settled_schema(schema)},
            "end": end,
        }
        for begin, schema, end in structures
    ]
    return {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": list(triggers), "tags": tags},
    }

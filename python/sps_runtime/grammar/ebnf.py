"""EBNF as clients write it: GBNF (llama.cpp's, xgrammar's: ``root ::= ...``), or Lark as it is."""

from __future__ import annotations

from sps_runtime.grammar.protocol import GrammarError


def to_lark(source: str) -> str:
    """Return the grammar in Lark. Raises GrammarError when it cannot be translated."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark  # only who needs it pays for the import

    try:
        return str(gbnf_to_lark(source))
    except RecursionError:
        raise GrammarError("the EBNF nests too deep") from None
    except Exception as error:  # the translator raises whatever it met
        message = " ".join(str(error).split())[:300]
        raise GrammarError(f"the EBNF cannot be read: {message}") from None

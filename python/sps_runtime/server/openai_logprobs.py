"""Logprobs in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.types.plan import TokenLogprobs

NEVER = -9999.0
"""What OpenAI answers for a probability of zero; JSON has no infinity."""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else NEVER


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice."""

    def one(token: int, value: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": _finite(value),
            "bytes": list(spelled),
        }

    content = [
        {
            **one(entry.token, NEVER if entry.logprob is None else entry.logprob),
            "top_logprobs": [one(token, value) for token, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content}


def completion_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, *, top: int, offset: int = 0
) -> tuple[dict[str, Any], int]:
    """The ``logprobs`` of a completion choice, and the offset behind its last token.

    Args:
        entries: one per token; a logprob of None becomes null (nothing precedes a first token).
        tokenizer: spells tokens.
        top: alternatives wanted; 0 gives null in their place.
        offset: characters before the first of these tokens.
    """
    texts = [tokenizer.token_text(entry.token) for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    body = {
        "tokens": texts,
        "token_logprobs": [None if e.logprob is None else _finite(e.logprob) for e in entries],
        "top_logprobs": [_top_by_text(e, tokenizer) for e in entries] if top else None,
        "text_offset": offsets,
    }
    return body, offset


def _top_by_text(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float] | None:
    """Alternatives by text, the chosen token among them; of equal texts the likelier counts."""
    if entry.logprob is None:
        return None
    texts: dict[str, float] = {}
    for token, value in (*entry.top, (entry.token, entry.logprob)):
        texts.setdefault(tokenizer.token_text(token), _finite(value))
    return texts


def whole_prompt(
    tokens: Sequence[int], judged: Sequence[TokenLogprobs], start: int = 0
) -> list[TokenLogprobs]:
    """Entries of the prompt positions from `start`; where nothing was judged, without a logprob.

    Args:
        tokens: the prompt.
        judged: what the engine reported: a run of positions up to the prompt's end.
        start: first position wanted.
    """
    first = len(tokens) - len(judged)
    unjudged = [TokenLogprobs(token, None) for token in tokens[start:first]]
    return [*unjudged, *judged[max(0, start - first) :]]

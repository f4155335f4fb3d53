"""Pages that requests need, have promised to them, and may still ask for."""

from __future__ import annotations

import math

from sps_runtime.scheduler.sequence import Run, Sequence

CLIP_NEW_TOKENS = 4096
"""Admission reserves for no more new tokens than this: clients ask for all the context has room for
and stop long before (SGLang's rule). Retraction serves those who do not."""


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def most_pages(sequence: Sequence, page_size: int) -> int:
    """Pages that a request can ever hold. The last token it generates needs no KV."""
    return pages_for(sequence.prompt_len + max(0, sequence.max_new - 1), page_size)


def reserved_pages(sequence: Sequence, page_size: int, conservativeness: float) -> int:
    """Pages that admission reserves: all known tokens, and a part of those still to come.

    A request that was retracted before reserves everything, so that it is retracted only once.
    """
    to_come = max(0, sequence.max_new - sequence.generated - 1)
    part = 1.0
    if not sequence.retractions:
        part = min(1.0, max(0.0, conservativeness))
        to_come = min(to_come, CLIP_NEW_TOKENS)
    return pages_for(len(sequence.tokens) + math.ceil(part * to_come), page_size)


def promised_pages(run: Run, page_size: int, conservativeness: float) -> int:
    """Pages reserved for a run that it has not taken yet."""
    reserved = reserved_pages(run.sequence, page_size, conservativeness)
    return max(0, reserved - len(run.table.pages))

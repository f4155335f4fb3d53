"""What echo ranks say: hashes of what they read, and the same without any rank or page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sps_runtime.grammar.matchers import without
from sps_runtime.grammar.protocol import Allowed, Matcher
from sps_runtime.sparse.audit import RECORD
from sps_runtime.types.attention import SparseCounters
from sps_runtime.types.plan import Burst, SequencePlan, TokenLogprobs
from sps_runtime.types.sampling import LogprobParams

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ECHO_DENSITY = 0.25
"""What echo ranks report of sparse attention."""


def mix(words: Words) -> Words:
    """splitmix64's finaliser, elementwise."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def prefix_states(entries: Ints) -> Words:
    """What each prefix of packed (position, token) entries hashes to."""
    return np.cumsum(mix(entries.astype(np.uint64)), dtype=np.uint64)


def entries_of(tokens: Iterable[int], start: int) -> Ints:
    ids = np.fromiter(tokens, dtype=np.int64)
    return (np.arange(start, start + len(ids), dtype=np.int64) << 32) | ids


def pick(
    state: int,
    vocab: int,
    forbidden: Collection[int],
    history: dict[int, int] | None,
    allowed: Allowed | None = None,
) -> int:
    """The token that follows: a hash, moved past what is forbidden and what no grammar allows."""
    if history is not None:
        counted = np.array([count << 32 | token for token, count in history.items()], np.uint64)
        state = (state + int(np.sum(mix(mix(counted)), dtype=np.uint64))) % 2**64
    token = int(mix(np.array([state], np.uint64))[0]) % vocab
    kept = without(np.ones(vocab, np.bool_) if allowed is None else allowed, forbidden)
    return int((token + np.flatnonzero(np.roll(kept, -token))[0]) % vocab)


def echo_ends(burst: Burst, epoch: int, tokens: Sequence[int]) -> bool:
    """Whether a burst ends after a step that sampled `tokens`: by a stop, or for no reason at all,
    as when a message comes."""
    stopped = any(token in ids for token, ids in zip(tokens, burst.stops, strict=True))
    return stopped or int(mix(np.array([epoch], np.uint64))[0]) % 5 == 0


def made_up_logprobs(
    state: int, token: int, top: int, ids: tuple[int, ...], vocab: int
) -> TokenLogprobs:
    def one(candidate: int) -> float:
        return -float(int(mix(np.array([state + candidate], np.uint64))[0]) % 1000) / 100.0

    ranked = tuple(((token + k) % vocab, one((token + k) % vocab)) for k in range(top))
    return TokenLogprobs(token, one(token), ranked, tuple((i, one(i)) for i in ids))


def made_up_counters(
    sequence: SequencePlan, tokens: int, others: int, page_size: int
) -> SparseCounters:
    """What a rank reports of sparse attention that computed `tokens` and read `others` pages of
    other ranks."""
    return SparseCounters(
        slot=sequence.slot,
        read_pairs=tokens,
        causal_pairs=int(tokens / ECHO_DENSITY),
        fetched_units=others,
        remote_units=4 * others,
        remote_bytes=others * page_size,
        audits=RECORD.pack(0, 0, sequence.start, 0.125, 0.25) if tokens else b"",
    )


def made_up_hidden(state: int) -> bytes:
    """Eight numbers in [0, 1), fp32."""
    words = mix(np.uint64(state) + np.arange(8, dtype=np.uint64))
    return ((words % np.uint64(1000)).astype("<f4") / np.float32(1000)).tobytes()


def echo_hidden(prompt: Sequence[int]) -> bytes:
    """What a server over echo ranks must report as a prompt's hidden state."""
    return made_up_hidden(int(prefix_states(entries_of(prompt, 0))[-1]))


def echo_generate(
    prompt: Sequence[int],
    n: int,
    *,
    vocab: int,
    stop_ids: Iterable[int] = (),
    min_new: int = 0,
    penalized: bool = False,
    matcher: Matcher | None = None,
) -> list[int]:
    """What a server over echo ranks must answer: up to `n` tokens, the stop token included."""
    stops = frozenset(stop_ids)
    history = dict.fromkeys(prompt, 0) if penalized else None
    state = int(prefix_states(entries_of(prompt, 0))[-1])
    output: list[int] = []
    while len(output) < n:
        forbidden = stops if len(output) < min_new else frozenset()
        allowed = None if matcher is None else matcher.allowed()
        token = pick(state, vocab, forbidden, history, allowed)
        output.append(token)
        if token in stops:
            break
        if matcher is not None:
            matcher.accept([token])
        if history is not None:
            history[token] = history.get(token, 0) + 1
        entry = entries_of([token], len(prompt) + len(output) - 1)
        state = (state + int(mix(entry.astype(np.uint64))[0])) % 2**64
    return output


def echo_prompt_logprobs(
    prompt: Sequence[int], wants: LogprobParams, vocab: int
) -> list[TokenLogprobs]:
    """What a server over echo ranks must report for every prompt position, from 0."""
    states = prefix_states(entries_of(prompt, 0)).tolist()
    judged = [
        made_up_logprobs(state, token, wants.top, wants.token_ids, vocab)
        for state, token in zip(states, list(prompt)[1:], strict=False)
    ]
    return [TokenLogprobs(prompt[0], None), *judged]

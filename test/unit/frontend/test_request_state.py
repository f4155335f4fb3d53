"""Tokens that come by two ways, and waits without a timer each."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest

from sps_runtime.frontend.detokenizer import ByteDecoder, TextStream
from sps_runtime.frontend.observer import NullObserver
from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.patience import Patience
from sps_runtime.frontend.request_state import RequestState
from sps_runtime.types.messages import StopReason, TokensOut
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

RID, LETTERS = "r", [97 + i for i in range(26)]


def make_state(stops: tuple[str, ...] = ()) -> RequestState:
    request = GenerateRequest(RID, pack_ids([1, 2]), SamplingParams(max_new_tokens=26))
    text = TextStream(ByteDecoder(lambda i: bytes([i])), stops)
    return RequestState(request, 0, "", text, keep_stop=False, observer=NullObserver())


def news(first: int, tokens: list[int], finish: StopReason | None = None) -> TokensOut:
    logprobs = tuple(TokenLogprobs(token, -float(token)) for token in tokens)
    return TokensOut(RID, tuple(tokens), finish, logprobs, first=first)


def two_ways(chance: random.Random, length: int) -> tuple[list[TokensOut], list[TokensOut]]:
    """What ranks tell as they sample, with gaps; what the scheduler says, all of it."""
    early = [news(i, [LETTERS[i]]) for i in range(length - 1) if chance.random() < 0.8]
    cuts = sorted({0, length, *(chance.randrange(1, length) for _ in range(4))})
    said = [
        news(a, LETTERS[a:b], StopReason("length") if b == length else None)
        for a, b in pairwise(cuts)
    ]
    return early, said


@pytest.mark.parametrize("seed", range(40))
def test_two_ways_give_one_answer_whoever_comes_first(seed: int) -> None:
    chance = random.Random(seed)
    early, said = two_ways(chance, length := chance.randrange(2, 27))
    state, tokens, text, logprobs = make_state(), [], "", []
    while state.finish is None:
        way = early if early and chance.random() < 0.7 else said
        state.feed(way.pop(0))
        output = state.take()
        tokens += output.tokens
        text += output.text
        logprobs += [entry.token for entry in output.logprobs]
    assert tokens == logprobs == LETTERS[:length]
    assert text == bytes(LETTERS[:length]).decode()
    assert state.completion_tokens == length


def test_a_stop_string_may_be_found_before_the_scheduler_speaks() -> None:
    state = make_state(("cd",))
    state.feed(news(0, LETTERS[:2]))
    for index in (2, 3):
        state.feed(news(index, [LETTERS[index]]))
    assert state.finish is not None and state.finish.matched == "cd"
    assert state.take().text == "ab"


def test_a_stop_token_hides_behind_what_was_known() -> None:
    state = make_state()
    for index in range(3):
        state.feed(news(index, [LETTERS[index]]))
    state.feed(news(0, LETTERS[:4], StopReason("stop", LETTERS[3])))
    output = state.take()
    assert (output.text, output.tokens) == ("abc", LETTERS[:4])
    assert output.finish is not None and output.finish.matched == LETTERS[3]


def test_without_a_place_tokens_follow_the_last() -> None:
    state = make_state()
    for token in LETTERS[:3]:
        state.feed(TokensOut(RID, (token,)))
    assert state.take().tokens == LETTERS[:3]


def test_silence_is_noticed_once_a_timeout() -> None:
    async def main() -> None:
        state = make_state()
        group = OutputGroup([state], lambda states, why: None)
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await group.next(0.05) is None
        assert loop.time() - began >= 0.045
        loop.call_later(0.02, lambda: (state.feed(news(0, LETTERS[:1])), group.notify(state)))
        output = await group.next(5.0)
        assert output is not None and output.tokens == LETTERS[:1]
        group.abort()

    asyncio.run(main())


def test_patience_counts_each_wait_from_its_own_begin() -> None:
    async def main() -> None:
        late: list[float] = []
        loop = asyncio.get_running_loop()
        patience = Patience(0.1, lambda: late.append(loop.time()))
        for _ in range(6):  # longer in all than one wait may last
            patience.begin()
            await asyncio.sleep(0.03)
            patience.end()
        assert not late
        patience.begin()
        began = loop.time()
        await asyncio.sleep(0.2)
        assert len(late) == 1 and 0.09 <= late[0] - began < 0.18
        patience.begin()
        patience.close()
        await asyncio.sleep(0.12)
        assert len(late) == 1

    asyncio.run(main())

"""The manager against an engine in memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from test.kit.fake_engine import FakeEngine

from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.query import (
    ChatPrompt,
    LogprobOptions,
    Query,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)
from sps_runtime.frontend.request_state import Finish
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.frontend.validation import Gate
from sps_runtime.types.errors import EngineDead, InvalidRequest, QueueFull
from sps_runtime.types.messages import PrefillProgress, StopReason, TokensBatch, TokensOut

TEXT = "The lazy dog, naïve café 你好 👩‍👩‍👧‍👦!"


def play(
    tokenizer: Tokenizer,
    scene: Callable[[TokenizerManager, FakeEngine], Awaitable[None]],
    engine: FakeEngine | None = None,
    *,
    context: int = 4096,
    **options: Any,
) -> None:
    """Run `scene` with a manager whose engine lives beside it; nothing may be left at its end."""

    async def main() -> None:
        fake = engine or FakeEngine()
        gate = Gate(Limits(context_length=context, vocab_size=512))
        manager = TokenizerManager(fake, tokenizer, gate, **options)
        tasks = [asyncio.create_task(manager.run()), asyncio.create_task(fake.live())]
        try:
            async with asyncio.timeout(20):
                await manager.wait_ready()
                await scene(manager, fake)
                assert manager.inflight == 0
                assert len(manager._labels) == 0
        finally:
            for task in tasks:
                task.cancel()
            manager.close()

    asyncio.run(main())


def text_query(
    text: str = TEXT, *, logprobs: LogprobOptions | None = None, **options: Any
) -> Query:
    label = options.pop("label", "")
    owner = options.pop("owner", "")
    return Query(
        prompt=TextPrompt(text),
        options=SamplingOptions(**options),
        logprobs=logprobs,
        label=label,
        owner=owner,
    )


async def read(group: OutputGroup) -> list[tuple[str, list[int], Finish | None]]:
    """The whole text, ids and finish of each sequence; each must finish once, and last."""
    texts = [""] * len(group.states)
    ids: list[list[int]] = [[] for _ in group.states]
    ends: list[Finish | None] = [None] * len(group.states)
    async for output in group:
        i = output.state.index
        assert ends[i] is None
        texts[i] += output.text
        ids[i] += output.tokens
        ends[i] = output.finish
    return list(zip(texts, ids, ends, strict=True))


def test_echo_comes_back(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        count = len(byte_level.encode(TEXT))
        group = await manager.submit([text_query(max_new_tokens=count)])
        ((text, ids, end),) = await read(group)
        assert text == TEXT
        assert end == Finish("length")
        assert group.states[0].completion_tokens == len(ids) == count

    play(byte_level, scene)


def test_slow_reader_gets_joined_outputs(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        group = await manager.submit([text_query(max_new_tokens=50)])
        while engine.running:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.01)
        outputs = [output async for output in group]
        assert len(outputs) == 1
        assert len(outputs[0].tokens) == 50

    play(byte_level, scene)


def test_stream_interval(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        group = await manager.submit([text_query("abc", max_new_tokens=20, n=1)])
        sizes = [len(output.tokens) async for output in group]
        assert sum(sizes) == 20
        assert sizes[0] == 1, "the first token is not kept waiting"
        assert all(size >= 8 for size in sizes[1:-1])

    play(byte_level, scene, FakeEngine(delay_s=0.002), stream_interval=8)


def test_stop_string_ends_both_sides(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        query = text_query("ABCDEFGH", max_new_tokens=1000, stop=["CDX", "EFG"])
        ((text, ids, end),) = await read(await manager.submit([query]))
        assert (text, end) == ("ABCD", Finish("stop", "EFG"))
        assert byte_level.decode(ids) == "ABCDEFG"
        await asyncio.sleep(0.01)
        assert not engine.running
        assert engine.aborted == [engine.requests[0].rid]
        kept = text_query("ABCDEFGH", stop="EFG", no_stop_trim=True)
        assert (await read(await manager.submit([kept])))[0][0] == "ABCDEFG"

    play(byte_level, scene, FakeEngine(per_step=3))


def test_stop_token_is_trimmed(byte_level: Tokenizer) -> None:
    dog = byte_level.encode("D")[0]

    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        ((text, ids, end),) = await read(
            await manager.submit([text_query("ABCDEFGH", stop_token_ids=[dog])])
        )
        assert (text, end) == ("ABC", Finish("stop", dog))
        assert ids[-1] == dog
        kept = text_query("ABCDEFGH", stop_token_ids=[dog], no_stop_trim=True)
        assert (await read(await manager.submit([kept])))[0][0] == "ABCD"

    play(byte_level, scene)


def test_many_at_once_each_get_their_own(byte_level: Tokenizer) -> None:
    rng = random.Random(5)

    async def one(manager: TokenizerManager) -> None:
        ids = [rng.randrange(300) for _ in range(rng.randint(1, 30))]
        count = rng.randint(0, 60)
        query = Query(prompt=TokenPrompt(ids), options=SamplingOptions(max_new_tokens=count, n=2))
        group = await manager.submit([query])
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.01)
            group.abort()
            assert all(end is not None for _, _, end in await read(group))
            return
        want = (ids * (count // len(ids) + 1))[:count]
        for text, got, _ in await read(group):
            assert got == want
            assert text == byte_level.decode(want)

    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        await asyncio.gather(*(one(manager) for _ in range(200)))

    play(byte_level, scene, FakeEngine(per_step=2))


def test_a_batch_is_sent_whole_or_not_at_all(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        with pytest.raises(InvalidRequest):
            await manager.submit([text_query("fine"), text_query("x" * 9000)])
        assert not engine.requests
        group = await manager.submit([text_query(c, max_new_tokens=2, n=2) for c in "abc"])
        assert [text for text, _, _ in await read(group)] == ["aa", "aa", "bb", "bb", "cc", "cc"]

    play(byte_level, scene)


def test_limits_of_a_batch(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        for queries in ([], [text_query()] * 65, [text_query(n=13)] * 5):
            with pytest.raises(InvalidRequest):
                await manager.submit(queries)

    play(byte_level, scene)


def test_queue_bound_is_checked_before_tokenizing(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        engine.held = True
        groups = [await manager.submit([text_query(max_new_tokens=4)]) for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            await manager.submit([text_query("y" * 3000)])
        assert caught.value.status == 503
        engine.held = False
        for group in groups:
            await read(group)

    play(byte_level, scene, max_inflight=3)


def test_long_text_does_not_block_the_loop(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        text = "The lazy dog jumps over the naïve fox. " * 60_000
        gaps, last, done = [], time.monotonic(), False

        async def tick() -> None:
            nonlocal last
            while not done:
                await asyncio.sleep(0.002)
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        ticking = asyncio.create_task(tick())
        started = time.monotonic()
        tokens = await manager.tokenize(text_query(text))
        took = time.monotonic() - started
        done = True
        await ticking
        assert len(tokens) > 500_000
        assert max(gaps) < max(0.25, took / 3), (max(gaps), took)

    play(byte_level, scene, context=1 << 20)


def test_labels(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        engine.held = True
        mine = await manager.submit([text_query(label="job-1", owner="a", n=2)])
        other = await manager.submit([text_query(label="job-1", owner="b")])
        for duplicate in ([text_query(label="job-1", owner="a")], [text_query(label="x")] * 2):
            with pytest.raises(InvalidRequest) as caught:
                await manager.submit(duplicate)
            assert caught.value.field == "rid"
        assert manager.abort_label("a", "job") == 0, "no prefixes"
        assert manager.abort_label("c", "job-1") == 0, "no strangers"
        assert manager.abort_label("a", "job-1") == 2
        ends = [end for _, _, end in await read(mine)]
        assert [end.kind for end in ends if end] == ["abort", "abort"]
        again = await manager.submit([text_query(label="job-1", owner="a")])
        assert manager.abort_all("a") == 1
        assert manager.abort_all() == 1
        await read(again)
        await read(other)
        await asyncio.sleep(0.01)
        assert not engine.running

    play(byte_level, scene)


def test_engine_failure_answers_everyone(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        engine.held = True
        groups = [await manager.submit([text_query(n=2)]) for _ in range(5)]
        flush = asyncio.create_task(manager.calls.fetch_state())
        await asyncio.sleep(0.01)
        assert (await flush).max_total_tokens == engine.max_total_tokens
        engine.fail("rank 1 died")
        for group in groups:
            assert all(end and end.status == 503 for _, _, end in await read(group))
        assert manager.health.state == "crashed"
        with pytest.raises(EngineDead):
            await manager.submit([text_query()])

    play(byte_level, scene)


def test_late_and_unknown_messages_are_ignored(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        engine.put(TokensBatch((TokensOut("nobody", (1, 2), StopReason("length")),)))
        engine.put(PrefillProgress("nobody", 1, 2))
        assert len(await read(await manager.submit([text_query()]))) == 1

    play(byte_level, scene)


def test_a_broken_stream_hurts_only_its_request(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        engine.held = True
        bad = await manager.submit([text_query()])
        good = await manager.submit([text_query("abc", max_new_tokens=3)])
        state = bad.states[0]
        engine.put(TokensBatch((TokensOut(state.rid, (1 << 40,)),)))
        ((_, _, end),) = await read(bad)
        assert end is not None
        assert (end.kind, end.status) == ("error", 500)
        engine.held = False
        assert (await read(good))[0][0] == "abc"

    play(byte_level, scene)


def test_logprobs_follow_their_tokens(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        wanted = LogprobOptions(top=2, token_ids=[5], prompt_start=0)
        group = await manager.submit(
            [text_query("ABCDEFGH", max_new_tokens=99, stop="CD", logprobs=wanted)]
        )
        entries = [entry async for output in group for entry in output.logprobs]
        assert [entry.token for entry in entries] == byte_level.encode("ABCD")
        assert [e.token for e in group.states[0].prompt_logprobs] == byte_level.encode("BCDEFGH")

    play(byte_level, scene, FakeEngine(per_step=3))


def test_a_reader_that_never_reads_is_ended(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        group = await manager.submit([text_query("ABCDEFGH" * 200, max_new_tokens=10)])
        state = group.states[0]
        while not state.finish:
            await asyncio.sleep(0.001)
        await read(group)
        engine.held = True
        stuck = await manager.submit([text_query("x")])
        many = tuple(byte_level.encode("ABCDEFGH" * 5000))
        for _ in range(10):
            engine.put(TokensBatch((TokensOut(stuck.states[0].rid, many),)))
        ((text, _, end),) = await asyncio.sleep(0.2, None) or await read(stuck)
        assert end is not None
        assert end.status == 408
        assert len(text) < 400_000

    play(byte_level, scene)


def test_chat_without_a_template(sentencepiece: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        query = Query(prompt=ChatPrompt([{"role": "user", "content": "hi"}]))
        with pytest.raises(InvalidRequest) as caught:
            await manager.submit([query])
        assert caught.value.code == "no_chat_template"

    play(sentencepiece, scene)


def test_the_pool_bounds_the_context(byte_level: Tokenizer) -> None:
    async def scene(manager: TokenizerManager, engine: FakeEngine) -> None:
        assert manager.limits.context_length == 64
        with pytest.raises(InvalidRequest, match="64"):
            await manager.submit([text_query("a b c", max_new_tokens=64)])

    play(byte_level, scene, FakeEngine(max_total_tokens=64))

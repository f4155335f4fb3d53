"""The worker that compiles clients' grammars: right, bounded, and replaceable."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from test.kit import tokenizers as kinds

from sps_runtime.config.process import GrammarWorkerConfig
from sps_runtime.frontend.grammar_checker import MAX_GRAMMAR_CHARS, GrammarChecker
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.grammar import GrammarSpec

DIGITS = GrammarSpec("regex", "[0-9]+")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return kinds.write_directory(path, kinds.byte_level_tokenizer())


def with_checker(
    directory: Path,
    work: Callable[[GrammarChecker], Awaitable[None]],
    timeout_s: float = 30.0,
    cpu_s: float = 5.0,
) -> None:
    async def run() -> None:
        config = GrammarWorkerConfig(
            backend="llguidance",
            tokenizer_path=str(directory),
            vocab_size=450,
            eos_token_ids=(2,),
            cpu_s=cpu_s,
        )
        checker = GrammarChecker(config, timeout_s=timeout_s)
        try:
            await work(checker)
        finally:
            checker.close()

    asyncio.run(run())


def worker_pid() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if b"grammar_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


async def refusal(checker: GrammarChecker, spec: GrammarSpec) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await checker.prepare(spec, "the_field")
    assert caught.value.field == "the_field" and caught.value.status == 400
    return caught.value.message


def test_good_and_bad_grammars(directory: Path) -> None:
    async def work(checker: GrammarChecker) -> None:
        texts = await asyncio.gather(*(checker.prepare(DIGITS, "regex") for _ in range(5)))
        assert len(set(texts)) == 1 and texts[0]
        assert "unclosed group" in await refusal(checker, GrammarSpec("regex", "(a"))
        schema = GrammarSpec("json_schema", '{"type": "object"}')
        assert "json_schema" in await checker.prepare(schema, "schema")
        long = GrammarSpec("regex", "a" * (MAX_GRAMMAR_CHARS + 1))
        assert "longer than" in await refusal(checker, long)

    with_checker(directory, work)


def test_a_worker_that_dies_costs_one_request(directory: Path) -> None:
    async def work(checker: GrammarChecker) -> None:
        await checker.prepare(DIGITS, "regex")
        first = worker_pid()
        os.kill(first, signal.SIGKILL)
        await refusal(checker, GrammarSpec("regex", "[a-z]"))
        assert await checker.prepare(DIGITS, "regex"), "verdicts are remembered"
        assert await checker.prepare(GrammarSpec("regex", "[b-z]"), "regex")
        assert worker_pid() != first

    with_checker(directory, work)


def test_a_slow_grammar_is_refused_and_its_worker_replaced(directory: Path) -> None:
    async def work(checker: GrammarChecker) -> None:
        await checker.prepare(DIGITS, "regex")
        first = worker_pid()
        os.kill(first, signal.SIGSTOP)
        assert "longer than 2 s" in await refusal(checker, GrammarSpec("regex", "slow"))
        assert not Path(f"/proc/{first}").exists()
        assert await checker.prepare(GrammarSpec("regex", "quick"), "regex")

    with_checker(directory, work, timeout_s=2.0)


def test_bombs_end_in_time(directory: Path) -> None:
    bombs = [
        GrammarSpec("regex", "(" * 20_000 + "a" + ")" * 20_000),
        GrammarSpec("regex", "((((a{1,900}){1,900}){1,900}){1,900}){1,900}"),
        GrammarSpec("ebnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
        GrammarSpec("json_schema", '{"items":' * 5_000 + "{}" + "}" * 5_000),
        GrammarSpec("json_schema", '{"$ref": "#"}'),
    ]

    async def work(checker: GrammarChecker) -> None:
        for bomb in bombs:
            async with asyncio.timeout(30):
                try:
                    await checker.prepare(bomb, "grammar")
                except InvalidRequest as error:
                    assert error.status == 400
        assert await checker.prepare(DIGITS, "regex")

    with_checker(directory, work, cpu_s=0.5)


def test_a_client_that_leaves_disturbs_nobody(directory: Path) -> None:
    async def work(checker: GrammarChecker) -> None:
        leaving = asyncio.create_task(checker.prepare(GrammarSpec("regex", "a"), "regex"))
        await asyncio.sleep(0)
        leaving.cancel()
        texts = [await checker.prepare(GrammarSpec("regex", pattern), "regex") for pattern in "abc"]
        assert len(set(texts)) == 3 and "a" in texts[0]

    with_checker(directory, work)


def test_a_grammar_that_computes_for_ever_is_ended(tmp_path: Path, directory: Path) -> None:
    """The limit is of computing, not of the clock. A plug-in's place is taken by a busy loop."""
    (tmp_path / "endless.py").write_text(
        "class Endless:\n"
        "    def __init__(self, vocabulary): pass\n"
        "    def prepare(self, spec):\n"
        "        while spec.source == 'endless': pass\n"
        "        return spec.source\n"
    )
    package = tmp_path / "endless-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: endless\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[sps_runtime.plugins]\ngrammar_backend.endless = endless:Endless\n"
    )

    async def run() -> None:
        config = GrammarWorkerConfig(
            backend="endless",
            tokenizer_path=str(directory),
            vocab_size=450,
            eos_token_ids=(2,),
            cpu_s=0.2,
        )
        checker = GrammarChecker(config, timeout_s=90.0)
        try:
            assert await checker.prepare(GrammarSpec("regex", "fine"), "regex") == "fine"
            told = await refusal(checker, GrammarSpec("regex", "endless"))
            assert "longer than 0.2 s" in told
            assert await checker.prepare(GrammarSpec("regex", "again"), "regex") == "again"
        finally:
            checker.close()

    with pytest.MonkeyPatch.context() as patch:
        paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        asyncio.run(run())

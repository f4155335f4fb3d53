"""What the how-tos show is run: programs and curl by a server, start commands by their parser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test.kit.echo_http import ROOT, EchoHttp

from sps_runtime.config.flags import parse
from sps_runtime.types.errors import ConfigError

PAGES = ("from_sglang", "from_vllm", "from_openai")
ADDRESS = "http://127.0.0.1:30000"
START = re.compile(r"(?:python -m sps_runtime\.launch_server|sps serve) (.*)")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def numbered(language: str) -> list[tuple[str, int]]:
    return [(page, i) for page in PAGES for i in range(len(blocks(page, language)))]


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    with EchoHttp(Path("embedded"), "--sp-size", "2", device="cpu") as running:
        running.wait_ready(110.0)
        yield running


def run(command: list[str], source: str) -> str:
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, source],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, source + done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("page", "number"), numbered("python"))
def test_programs_run(server: EchoHttp, page: str, number: int) -> None:
    source = blocks(page, "python")[number].replace(ADDRESS, server.url)
    assert run([sys.executable, "-W", "error::RuntimeWarning", "-c"], source).strip()


@pytest.mark.parametrize(("page", "number"), numbered("bash"))
def test_commands_run(server: EchoHttp, page: str, number: int) -> None:
    source = blocks(page, "bash")[number]
    starts = START.findall(source)
    for arguments in starts:
        assert not parse(arguments.split()).ignored
    if not starts:
        assert ADDRESS in source
        assert run(["bash", "-euc"], source.replace(ADDRESS, server.url)).strip()


def test_every_page_shows_how_to_start_and_to_ask() -> None:
    for page in PAGES:
        assert any(START.search(block) for block in blocks(page, "bash")), page
        assert blocks(page, "python"), page


def flags_of(page: str, column: int) -> list[str]:
    """Flags that the page's tables show in a column."""
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[column])]


@pytest.mark.parametrize("flag", sorted(set(flags_of("from_vllm", 1))))
def test_flags_that_replace_others_exist(flag: str) -> None:
    try:
        parse([flag])
    except ConfigError as error:
        assert "unknown argument" not in str(error), error


@pytest.mark.parametrize(
    ("flag", "exists"),
    [
        ("--max-model-len", False),
        ("--gpu-memory-utilization", False),
        ("--tensor-parallel-size", True),
        ("--served-model-name", True),
    ],
)
def test_flags_of_vllm(flag: str, exists: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([flag])
    assert ("unknown argument" not in str(caught.value)) == exists


def test_every_flag_that_from_sglang_calls_the_same_exists() -> None:
    text = (ROOT / "docs" / "howto" / "from_sglang.md").read_text()
    same = text[text.index("Flags are SGLang's") : text.index("Some take fewer")]
    flags = re.findall(r"`(--[\w-]+)`", same)
    assert len(flags) > 30
    for flag in flags:
        try:
            assert parse([flag]).ignored == ()
        except ConfigError as error:
            assert "expected one argument" in str(error), error

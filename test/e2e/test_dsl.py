"""SGLang programs against our server, by SGLang's own front end and by ours: the same results."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest
from test.kit.echo_http import EchoHttp

import sps_runtime.lang

CLIENTS = Path(__file__).parents[1] / "clients"
PROGRAMS = CLIENTS / "dsl_programs.py"
HAS_SGLANG = importlib.util.find_spec("sglang") is not None
needs_sglang = pytest.mark.skipif(not HAS_SGLANG, reason="the extra [dsl] is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    with EchoHttp(Path("embedded"), "--sp-size", "2", device="cpu") as running:
        running.wait_ready(110.0)
        yield running


def printed(program: Path, backend: str) -> list[str]:
    """What `program` prints."""
    command = [sys.executable, str(program), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def run(program: Path, backend: str) -> list[str]:
    """What our own programs print, all of them."""
    lines = printed(program, backend)
    assert lines[-1].endswith("all 9")
    return lines[:-1]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same programs under the other import."""
    source = PROGRAMS.read_text()
    theirs = "import sglang as sgl"
    assert source.count(theirs) == 1
    program = tmp_path_factory.mktemp("lang") / PROGRAMS.name
    program.write_text(source.replace(theirs, "import sps_runtime.lang as sgl"))
    return program


@pytest.fixture(scope="module")
def by_sglang(server: EchoHttp) -> list[str]:
    return run(PROGRAMS, server.url)


@needs_sglang
def test_programs_run_unmodified(by_sglang: list[str]) -> None:
    assert by_sglang


@needs_sglang
@pytest.mark.parametrize(
    ("script", "checks", "skipped"),
    [("dsl_test_programs.py", 18, 1), ("dsl_documented.py", 16, 0)],
)
def test_its_own_tests_and_documented_uses_pass(
    server: EchoHttp, script: str, checks: int, skipped: int
) -> None:
    lines = printed(CLIENTS / script, server.url)
    assert sum(line.startswith("ok ") for line in lines) == checks, lines
    assert sum(line.startswith("skip ") for line in lines) == skipped, lines


@pytest.fixture(scope="module")
def by_ours(server: EchoHttp, ours: Path) -> list[str]:
    return run(ours, server.url)


@needs_sglang
def test_our_front_end_gives_the_same(by_ours: list[str], by_sglang: list[str]) -> None:
    assert by_ours == by_sglang


def test_an_engine_gives_the_same_as_a_server(by_ours: list[str], ours: Path) -> None:
    assert run(ours, "engine") == by_ours


class WithOurs(SourceFileLoader):
    """Loads a module that imports SGLang's front end with ours in its place."""

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text()
        ours = source.replace("import sglang as sgl", "import sps_runtime.lang as sgl")
        assert ours != source
        code: CodeType = self.source_to_code(ours, self.path)
        return code


@needs_sglang
def test_test_programs_of_sglang_run_under_our_front_end(server: EchoHttp) -> None:
    """Those that ask for no knowledge; what they assert is theirs."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "test" / "test_programs.py"
    loader = WithOurs("programs_of_sglang", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    programs = importlib.util.module_from_spec(spec)
    loader.exec_module(programs)
    sps_runtime.lang.set_default_backend(sps_runtime.lang.RuntimeEndpoint(server.url))
    try:
        programs.test_mt_bench()
        programs.test_select(check_answer=False)
        programs.test_expert_answer(check_answer=False)
        programs.test_parallel_decoding()
        programs.test_parallel_encoding(check_answer=False)
        programs.test_stream()
        programs.test_regex()
        programs.test_dtype_gen()
    finally:
        sps_runtime.lang.set_default_backend(None)

"""Each example against the embedded model, by SGLang's front end and by ours: shapes, and reuse.

What the examples find is up to the model; that they share prefixes is up to them and to us.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import pytest
from test.kit.echo_http import ROOT, EchoHttp

from sps_runtime import lang

EXAMPLES = ROOT / "examples"
OURS = "import sps_runtime.lang as sgl  # or: import sglang as sgl\n"
THEIRS = "import sglang as sgl\n"
needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="the extra [dsl] is not installed"
)
EITHER = [pytest.param(OURS, id="ours"), pytest.param(THEIRS, id="sglang", marks=needs_sglang)]
PAGE = 64


class WithImport(SourceFileLoader):
    """Loads an example with another front end in the place of ours."""

    def __init__(self, name: str, front_end: str) -> None:
        super().__init__(f"example_{name}", str(EXAMPLES / f"{name}.py"))
        self._front_end = front_end

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text()
        assert source.count(OURS) == 1
        code: CodeType = self.source_to_code(source.replace(OURS, self._front_end), self.path)
        return code


def load(loader: SourceFileLoader) -> ModuleType:
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples run in this process and set the default backend of all programs."""
    monkeypatch.setattr(lang.global_config, "default_backend", None)


@pytest.fixture(scope="module")
def server() -> Iterator[EchoHttp]:
    with EchoHttp(Path("embedded"), "--sp-size", "2", device="cpu") as running:
        running.wait_ready(110.0)
        yield running


@pytest.mark.parametrize("front_end", EITHER)
def test_map_reduce(server: EchoHttp, front_end: str) -> None:
    example = load(WithImport("map_reduce", front_end))
    made = example.main(server.url)
    chapters = len(made["notes"])
    assert chapters >= 3 and "\n\n".join(example.chapters_of("a\n\nb")) == "a\n\nb"
    assert all(len(notes) == len(example.QUESTIONS) for notes in made["notes"])
    assert all(isinstance(note, str) and note for notes in made["notes"] for note in notes)
    assert all(min(cached) > 1000 for cached in made["cached_tokens"])  # its whole chapter


@pytest.mark.parametrize("front_end", EITHER)
def test_tree_search(server: EchoHttp, front_end: str) -> None:
    made = load(WithImport("tree_search", front_end)).main(server.url)
    values = [value for value, _ in made["answers"]]
    assert values == sorted(values, reverse=True) and all(value <= 0 for value in values)
    assert len({answer for _, answer in made["answers"]}) == len(values) in (1, 2)
    assert min(made["cached_tokens"]) > 6000  # the document was read once


@pytest.mark.parametrize("front_end", EITHER)
def test_rag(server: EchoHttp, front_end: str) -> None:
    example = load(WithImport("rag", front_end))
    passages = example.DOCUMENT.read_text().split("\n\n")
    shared, own = example.retrieve(passages, example.QUESTIONS)
    assert shared and len(own) == len(example.QUESTIONS)
    names = ("Diana Ramos", "Bella Moore", "Jack Taylor", "Michael Archer")
    for name, numbers in zip(names, own, strict=True):
        assert any(name in passages[number] for number in [*shared, *numbers]), name
    made = example.main(server.url)
    assert len(made["answers"]) == len(example.QUESTIONS) and all(made["answers"])
    at_least = sum(len(passages[number].split()) for number in shared) // PAGE * PAGE
    assert min(made["cached_tokens"]) >= at_least > 0


@pytest.mark.parametrize("front_end", EITHER)
def test_extraction(server: EchoHttp, front_end: str) -> None:
    example = load(WithImport("extraction", front_end))
    made = example.main(server.url)
    assert list(made["records"]) == example.NAMES
    for record in made["records"].values():
        assert len(record["badge"]) == 4 and record["badge"].isdigit()
    assert min(made["cached_tokens"]) > 6000  # the document was computed before the first run


def test_agent(server: EchoHttp) -> None:
    example = load(SourceFileLoader("example_agent", str(EXAMPLES / "agent.py")))
    messages = example.main(server.url)
    assert [message["role"] for message in messages[:3]] == ["user", "assistant", "tool"]
    called = messages[1]["tool_calls"][0]
    assert json.loads(called["function"]["arguments"])["name"] in example.PEOPLE
    assert messages[2]["tool_call_id"] == called["id"]
    assert messages[2]["content"] == example.search(
        json.loads(called["function"]["arguments"])["name"]
    )
    assert messages[-1]["role"] == "assistant" and messages[-1]["content"]


def test_an_example_runs_as_its_docstring_says(server: EchoHttp) -> None:
    command = [sys.executable, "examples/rag.py", server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tokens found computed" in done.stdout

"""Rules of the house that a linter of style does not know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test.hygiene import lint

SHIPPED = [lint.PACKAGE]
OURS = [
    lint.ROOT / name
    for name in ("python", "test", "examples", "benchmark", "recipes", "sgl-kernel/python")
]
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def check(found: dict[Path, list[str]]) -> None:
    lines = [f"{path}:{what}" for path, all_ in found.items() for what in all_]
    assert not lines, "\n" + "\n".join(lines)


def scan(find: object, directories: list[Path] = SHIPPED) -> dict[Path, list[str]]:
    assert callable(find)
    return {path: find(path.read_text()) for path in lint.python_files(*directories)}


def test_nothing_deserializes_code() -> None:
    kernel = lint.ROOT / "sgl-kernel" / "python"
    check(scan(lint.forbidden, [lint.PACKAGE, kernel]))


def test_only_config_reads_the_environment() -> None:
    found = scan(lint.environment_reads)
    allowed = lint.PACKAGE / "config" / "environment.py"
    check({path: reads for path, reads in found.items() if path != allowed})


def test_files_and_functions_are_short() -> None:
    def too_long(source: str) -> list[str]:
        lines = source.count("\n")
        return [f"{lines} lines"] if lines > MAX_FILE_LINES else []

    check(scan(too_long, OURS))
    check(scan(lambda source: lint.long_functions(source, MAX_FUNCTION_LINES), OURS))


def test_no_global_statement() -> None:
    check(scan(lint.global_statements, OURS))


def test_nothing_is_left_unfinished() -> None:
    def unfinished(source: str) -> list[str]:
        lines = enumerate(source.splitlines(), 1)
        return [f"{number}: {line.strip()}" for number, line in lines if UNFINISHED.search(line)]

    found = scan(unfinished, OURS)
    check({path: lines for path, lines in found.items() if "hygiene" not in path.parts})


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch as t\nt.load('x')",
        "import torch.distributed as dist\ndist.broadcast_object_list([])",
        "from torch.distributed import all_gather_object\nall_gather_object([], 1)",
        "eval('1')",
        "socket.recv_pyobj()",
        "import yaml\nyaml.load('x')",
        "from multiprocessing import Queue",
        "from jinja2 import Environment",
    ],
)
def test_the_lint_finds_what_it_is_for(source: str) -> None:
    assert lint.forbidden(source)


def test_the_lint_finds_no_more() -> None:
    harmless = "import yaml, json\nyaml.safe_load('x')\njson.loads('1')\nmodel.eval()\n"
    assert lint.forbidden(harmless) == []
    assert lint.environment_reads("import os\nos.environ.get('A')")
    assert lint.environment_reads("from os import environ\nenviron['A']")
    assert lint.global_statements("def f():\n    global x\n    x = 1")
    assert lint.long_functions("def f():\n" + "    x = 1\n" * 60, 60)

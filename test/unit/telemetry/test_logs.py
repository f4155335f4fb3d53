"""Log lines cannot be forged and parse as what they claim to be."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from sps_runtime.telemetry.logs import setup_logging


@pytest.fixture(autouse=True)
def keep_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", "json", "rank-0")
    logging.getLogger("x").info("one\ntwo %s", "\x1b[31m", extra={"fields": {"tokens": 3}})
    logging.getLogger("x").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["message"], entry["process"], entry["tokens"]) == (
        "one\ntwo \x1b[31m",
        "rank-0",
        3,
    )


def test_plain_lines_escape_what_could_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", "plain", "http")
    logging.getLogger("x").warning("name %s", "a\n12:00:00 ERROR forged\x1b[2J")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  12:00:00 ERROR forged\\x1b")


def test_exceptions_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", "json", "http")
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError:
        logging.getLogger("x").exception("failed")
    assert "ZeroDivisionError: oh" in json.loads(capsys.readouterr().err)["exception"]

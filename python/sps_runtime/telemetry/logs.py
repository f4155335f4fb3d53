"""Log lines on stderr, plain for people or JSON for collectors."""

from __future__ import annotations

import json
import logging
import os
import sys
import time


class _Escaping(logging.Formatter):
    """Plain lines; control characters are escaped, so that no value can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = super().format(record).split("\n")
        return "\n".join([_escape(first), *("  " + _escape(line) for line in rest)])


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Json(logging.Formatter):
    """One JSON object a line; fields given as ``extra={"fields": {...}}`` stand at top level."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def setup_logging(level: str, format: str, process: str) -> None:
    """Send this process's log to stderr; replaces what was set up before.

    Args:
        level: as logging names it, in any case.
        format: ``plain`` or ``json``.
        process: this process's name, in every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(_Json(process))
    else:
        line = f"%(asctime)s %(levelname)-7s {process}[{os.getpid()}] %(message)s"
        handler.setFormatter(_Escaping(line, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())

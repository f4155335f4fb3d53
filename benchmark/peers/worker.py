"""The far side of `peers.protocol`: `python -m peers.worker MODULE` in the peer's environment.

MODULE is a file of `peers.adapters` whose `make()` returns the adapter.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import IO, Any

PR_SET_PDEATHSIG = 1
METHODS = frozenset({"prepare", "start", "generate", "stop", "api"})


def answer(adapter: Any, line: str) -> dict[str, Any]:
    """Run one request; never raises for what the adapter does."""
    request = json.loads(line)
    name = request.pop("do")
    if name not in METHODS:
        return {"error": f"no method {name!r}"}
    try:
        result = adapter.API if name == "api" else getattr(adapter, name)(**request)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ok": result}


def serve(adapter: Any, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the other side closes."""
    for line in requests:
        replies.write(json.dumps(answer(adapter, line)) + "\n")
        replies.flush()


def own_stdout() -> IO[str]:
    """The reply stream; whatever the peer prints, from Python or C, goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return replies


def end_with_parent() -> None:
    """Be killed when the benchmark dies: a worker that it had stopped would stay for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    replies = own_stdout()
    adapter = importlib.import_module(f"peers.adapters.{sys.argv[1]}").make()
    serve(adapter, sys.stdin, replies)


if __name__ == "__main__":
    main()

"""A child for the tests of `ipc.process`."""

from __future__ import annotations

import os
import signal
import time

import msgspec

from sps_runtime.ipc.process import child_context, spawn
from sps_runtime.types.errors import ConfigError


class ChildConfig(msgspec.Struct):
    do: str
    path: str = ""


def main() -> None:
    with child_context(ChildConfig) as child:
        match child.config.do:
            case "echo":
                text = os.pread(child.fds["text"], 100, 0).decode()
                child.ready(f"{child.name} {text} {sorted(os.sched_getaffinity(0))}")
            case "refuse":
                raise ConfigError("no such\nthing")
            case "break":
                raise ZeroDivisionError("oh")
            case "sleep":
                child.ready(str(os.getpid()))
                time.sleep(60)
            case "parent":  # starts a grandchild and waits to be killed
                grandchild = spawn("child_program", ChildConfig("sleep"), name="grandchild")
                while not (lines := grandchild.read_status()):
                    time.sleep(0.01)
                child.ready(str(lines[0].detail))
                signal.pause()


if __name__ == "__main__":
    main()

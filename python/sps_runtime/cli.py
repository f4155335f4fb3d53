"""``sps serve | chat | doctor | version``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from sps_runtime import __version__

Run = Callable[[Sequence[str]], int]


def _serve(arguments: Sequence[str]) -> int:
    from sps_runtime.launch.serve import main as serve

    return serve(arguments, "sps serve")


def _chat(arguments: Sequence[str]) -> int:
    from sps_runtime.chat.main import main as chat

    return chat(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from sps_runtime.launch.doctor import examine, report

    if arguments:
        print(f"error: doctor takes no arguments, not {arguments[0]!r}", file=sys.stderr)
        return 2
    print(report(examine()))
    return 0


def _version(arguments: Sequence[str]) -> int:
    print(__version__)
    return 0


COMMANDS: Mapping[str, tuple[Run, str]] = {
    "serve": (_serve, "serve a model over HTTP; `sps serve --help` lists the flags"),
    "chat": (_chat, "ask a server of long documents; `sps chat --help` lists the flags"),
    "doctor": (_doctor, "say what this machine has, and what each missing piece costs"),
    "version": (_version, "print the version"),
}


def _usage() -> str:
    lines = [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: sps COMMAND [ARGUMENTS]", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f"error: no command {given[0]!r}\n{_usage()}", file=sys.stderr)
        return 2
    return COMMANDS[given[0]][0](given[1:])


if __name__ == "__main__":
    sys.exit(main())

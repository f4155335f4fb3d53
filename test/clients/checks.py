"""What the scripts of this directory share: run every check of a module, say what was checked.

Standard library only: it runs in every client's environment.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping


class Skip(Exception):
    """A check that does not apply; the message says why."""


def run_one(name: str, check: Callable[[], object]) -> bool:
    """Run one check and print its outcome; whether it did not fail."""
    try:
        note = check()
    except Skip as reason:
        print(f"skip {name}: {reason}", flush=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        traceback.print_exc(file=sys.stdout)
        print(f"FAILED {name}: {error!r}", flush=True)
        return False
    else:
        print(f"ok {name}{f': {note}' if isinstance(note, str) else ''}", flush=True)
    return True


def run_all(namespace: Mapping[str, object], *arguments: object) -> None:
    """Run every ``check_*`` function of a module in the order it was written; exit 1 if one fails.

    Args:
        namespace: the module's ``globals()``.
        arguments: given to every check.
    """
    passed = []
    for name, value in list(namespace.items()):
        if name.startswith("check_") and callable(value):
            bound = _bind(value, arguments)
            passed.append(run_one(name.removeprefix("check_"), bound))
    if not passed or not all(passed):
        sys.exit(1)


def _bind(check: Callable[..., object], arguments: tuple[object, ...]) -> Callable[[], object]:
    return lambda: check(*arguments)

"""Which logical CPUs ranks of other servers on this machine are bound to.

Ranks are told their CPUs on their command line (`ipc.process`), so nothing needs to be written down
or cleaned up. Servers that start at the same moment, or in other process namespaces, do not see
one another.
"""

from __future__ import annotations

import json
from pathlib import Path

RANK = b"sps_runtime.runner.process"


def claimed_cpus(proc: Path = Path("/proc")) -> frozenset[int]:
    """CPUs of all ranks that run here and are bound; none where /proc cannot be read."""
    claimed: set[int] = set()
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is not ours to see
            continue
        if RANK in words:
            claimed.update(_cores(words[words.index(RANK) + 1 :]))
    return frozenset(claimed)


def _cores(words: list[bytes]) -> list[int]:
    try:
        cores = json.loads(words[0])["cores"]
    except (IndexError, KeyError, TypeError, ValueError):
        return []
    return [cpu for cpu in cores if isinstance(cpu, int)] if isinstance(cores, list) else []

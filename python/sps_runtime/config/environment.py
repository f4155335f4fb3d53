"""Every environment variable that this package reads.

SPS_API_KEY, SPS_ADMIN_API_KEY: keys (several: separated by commas), as ``--api-key`` and
``--admin-api-key`` but invisible in the process list. SPS_DIST_KEY: the secret that hosts of one
engine share, as ``--dist-key-file``. XDG_CACHE_HOME, HOME: where packed weights are kept.

Child processes get this process's variables and those that libraries read when they start
(`rank_environment`, `service_environment`). What the user set stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sps_runtime.types.errors import ConfigError


def api_keys() -> list[str]:
    return _keys("SPS_API_KEY")


def admin_keys() -> list[str]:
    return _keys("SPS_ADMIN_API_KEY")


def dist_key(file: str) -> bytes:
    """The secret of a multi-host engine, from `file` or the environment.

    Raises:
        ConfigError: when there is none, or it is shorter than 16 bytes.
    """
    if file:
        try:
            key = Path(file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"--dist-key-file {file}: {error.strerror}") from None
    else:
        key = os.environ.get("SPS_DIST_KEY", "").encode()
    if len(key) < 16:
        raise ConfigError(
            "several hosts need a shared secret of at least 16 bytes: --dist-key-file, or "
            "SPS_DIST_KEY in the environment, the same on all hosts"
        )
    return key


def rank_environment(threads: int) -> dict[str, str]:
    """Variables of a rank with `threads` compute threads.

    OpenMP's threads sleep when they have nothing to do: the kernels' own threads run on the same
    cores between torch's operators. The allocator keeps what it has instead of giving each large
    activation back to the system, which would zero its pages again; a user who sets any variable
    of the allocator has all of them as they were.
    """
    added = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if not own_allocator_settings():
        added |= ALLOCATOR
    return {**added, **os.environ, "OMP_NUM_THREADS": str(threads)}


def service_environment() -> dict[str, str]:
    """Variables of a process that computes nothing: no pools of threads beside its own."""
    return {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **os.environ}


def own_allocator_settings() -> Mapping[str, str]:
    """The user's own variables of glibc's allocator."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    }


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc's allocator in a rank (measured in benchmark/threads.py)."""


def read_key_file(path: str) -> list[str]:
    """One key a line; empty lines and lines that start with # do not count."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read keys from {path}: {error.strerror}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def hash_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """SHA-256 of each key, in hex: what processes hand on instead of keys."""
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def weight_cache_dir(wish: str) -> str:
    """The directory of packed weights; "" for none.

    Args:
        wish: ``auto``, ``none`` or a directory.
    """
    if wish == "none":
        return ""
    if wish != "auto":
        return str(Path(wish).absolute())
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # the XDG specification: others are invalid
        home = os.environ.get("HOME", "")
        if not os.path.isabs(home):
            return ""
        caches = os.path.join(home, ".cache")
    return os.path.join(caches, "sps-runtime", "weights")


def _keys(name: str) -> list[str]:
    return [key for key in os.environ.get(name, "").split(",") if key]

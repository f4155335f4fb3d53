"""Every environment variable that this package reads.

SPS_API_KEY, SPS_ADMIN_API_KEY: keys (several: separated by commas), as ``--api-key`` and
``--admin-api-key`` but invisible in the process list. SPS_DIST_KEY: the secret that hosts of one
engine share, as ``--dist-key-file``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
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


def _keys(name: str) -> list[str]:
    return [key for key in os.environ.get(name, "").split(",") if key]

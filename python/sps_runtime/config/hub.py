"""Where a model's files are: a directory, or a Hugging Face hub name fetched into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from sps_runtime.types.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")
FILES = ("*.json", "*.safetensors", "*.jinja")


def resolve_model_path(name: str, revision: str | None = None) -> Path:
    """Return the directory of model `name`: the directory itself, or the hub's snapshot of it.

    A hub name needs the ``huggingface_hub`` package, and the network unless the snapshot is cached.

    Raises:
        ConfigError: when there is no such directory and no such model can be fetched.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if not HUB_NAME.match(name) or name.startswith("."):
        raise ConfigError(f"model path {name!r} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"model path {name!r} does not exist, and to fetch it as a hub name the package "
            "huggingface_hub is needed"
        ) from None
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(FILES), etag_timeout=5.0)
        )
    except Exception as error:  # the hub's errors share no base beyond Exception
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"model {name!r} is no directory and cannot be fetched from the hub: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from None

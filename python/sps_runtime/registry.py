"""Plug-in points are dicts of "name -> module:attr"; this resolves one name.

A module is imported only when its name is asked for. Third parties add names with the entry-point
group `sps_runtime.plugins`, entries called ``<table>.<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from sps_runtime.types.errors import ConfigError

PLUGINS = "sps_runtime.plugins"


def resolve(table: str, builtin: Mapping[str, str], name: str) -> Any:
    """Return what `name` means in `builtin`, or in a plug-in's entry ``<table>.<name>``.

    Raises:
        ConfigError: when nobody knows the name; the message lists the names that are known.
    """
    if name in builtin:
        module, _, attr = builtin[name].partition(":")
        return getattr(import_module(module), attr)
    plugins = {entry.name: entry for entry in entry_points(group=PLUGINS)}
    if f"{table}.{name}" in plugins:
        return plugins[f"{table}.{name}"].load()
    more = [key.removeprefix(f"{table}.") for key in plugins if key.startswith(f"{table}.")]
    known = ", ".join(sorted([*builtin, *more]))
    raise ConfigError(f"unknown {table} {name!r}; known: {known}")

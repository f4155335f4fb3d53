"""The engine without HTTP: ``from sps_runtime.engine import Engine``."""

from sps_runtime.engine.engine import Engine

__all__ = ["Engine"]

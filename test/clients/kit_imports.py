"""Imports SGLang's test kits without its runtime, whose modules are stood in for.

`sglang` becomes a bare package over the installed files, so that its kits and their pure helpers
are the wheel's own, while `sglang.srt`, `sglang.benchmark` and the like (torch, CUDA kernels,
server code) are modules whose every name is a mock.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import random
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

STOOD_IN = (
    "sglang.srt",
    "sglang.benchmark",
    "sglang.utils",
    "sglang.lang",
    "sglang.test.run_eval",
    "sglang.test.send_one",
    "sglang.test.server_fixtures",
    "sglang.test.sgl_eval_utils",
    "sglang.test.test_utils",
)


class Mocked(ModuleType):
    """A module in which every name is a mock."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `STOOD_IN`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(name == stood or name.startswith(f"{stood}.") for stood in STOOD_IN):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Mocked(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@dataclass
class RequestOutput:
    """What cache_hit_kit keeps of a request; `sglang.benchmark` has the same fields."""

    success: bool = False
    error: str = ""
    ttft: float = 0.0
    latency: float = 0.0
    prompt_len: int = 0
    generated_text: str = ""
    itl: list[float] = field(default_factory=list)


def random_requests(*, input_len: int, num_prompts: int, **_: Any) -> list[Any]:
    """Prompts of random ids, for SGLang's sampler of a data set that it downloads."""
    return [
        types.SimpleNamespace(prompt=[random.randrange(300, 2000) for _ in range(input_len)])
        for _ in range(num_prompts)
    ]


def prepare() -> Path:
    """Put the bare package and the stand-ins in place; the kits' directory."""
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    bare = ModuleType("sglang")
    bare.__path__ = [str(root)]
    sys.modules["sglang"] = bare
    sys.meta_path.insert(0, StandIns())
    serving: Any = importlib.import_module("sglang.benchmark.serving")
    serving.RequestFuncOutput = RequestOutput
    data: Any = importlib.import_module("sglang.benchmark.datasets.random")
    data.sample_random_requests = random_requests
    utils: Any = importlib.import_module("sglang.benchmark.utils")
    utils.remove_prefix = str.removeprefix
    return root / "test" / "kits"


def load(kit: str) -> ModuleType:
    """The kit's module."""
    return importlib.import_module(f"sglang.test.kits.{kit}")

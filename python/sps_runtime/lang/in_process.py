"""Programs without a server: against an `Engine` of this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from sps_runtime import __version__
from sps_runtime.config.options import EMBEDDED
from sps_runtime.engine import Engine
from sps_runtime.lang.backend import Backend


class EngineBackend(Backend):
    """An engine that is already there.

    Args:
        engine: the engine; it stays the caller's to shut down.
        model_path: names the model, and thereby its chat template.
        chat_template_name: instead of that.
    """

    def __init__(
        self, engine: Engine, model_path: str = "", chat_template_name: str | None = None
    ) -> None:
        super().__init__(model_path, chat_template_name)
        self.engine = engine

    def ask(self, body: dict[str, Any]) -> Any:
        return self.engine.generate(**_arguments(body))

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.engine.generate(**_arguments(body), stream=True)

    def flush_cache(self) -> None:
        if not self.engine.flush_cache():
            raise RuntimeError("the cache is in use: requests run or wait")

    def get_server_info(self) -> dict[str, Any]:
        state = self.engine.state()
        return {
            "version": __version__,
            "model_path": self.model_path,
            "max_total_num_tokens": state.max_total_tokens,
            "internal_states": [msgspec.to_builtins(state)],
        }


class Runtime:
    """An engine of its own for programs, which ends with the process or by `shutdown`.

    Args:
        model_path: a directory, a hub name, or ``embedded``.
        chat_template_name: instead of the one that the model's path says.
        settings: of the `Engine`, such as ``sp_size=2``.

    Attributes:
        endpoint: the backend; ``set_default_backend(Runtime(...))`` finds it.
    """

    def __init__(
        self,
        model_path: str = EMBEDDED,
        *,
        chat_template_name: str | None = None,
        **settings: Any,
    ) -> None:
        self.engine = Engine(model_path, **settings)
        self.endpoint = EngineBackend(self.engine, model_path, chat_template_name)

    def shutdown(self) -> None:
        """End the engine; harmless when it has ended."""
        self.engine.shutdown()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _arguments(body: dict[str, Any]) -> dict[str, Any]:
    fields = dict(body)
    return {"prompt": fields.pop("text", None), **fields}

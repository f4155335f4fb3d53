"""What holds for all programs of a process unless they say otherwise."""

from __future__ import annotations

from typing import Any

from sps_runtime.lang.backend import Backend


class Settings:
    """The only state of this package: programs name their backend once, not at every call.

    Attributes:
        default_backend: where programs run that name none: a `Backend`, or what has one as
            ``endpoint``.
        enable_precache_with_tracing: whether run_batch has the text that all runs begin with
            computed first.
    """

    def __init__(self) -> None:
        self.default_backend: Any = None
        self.enable_precache_with_tracing = True

    def backend(self, told: Any = None) -> Backend:
        """`told`, or else the default.

        Raises:
            ValueError: there is none, or it is no backend.
        """
        chosen = self.default_backend if told is None else told
        chosen = getattr(chosen, "endpoint", chosen)
        if chosen is None:
            raise ValueError("no backend: call set_default_backend, or give backend=")
        if not isinstance(chosen, Backend):
            raise ValueError(
                f"{type(chosen).__name__} is no backend: give RuntimeEndpoint(url), "
                "EngineBackend(engine) or Runtime(model_path)"
            )
        return chosen


global_config = Settings()

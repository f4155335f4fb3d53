"""A front end for SGLang programs: the same words, without SGLang.

One program file runs under either import::

    import sps_runtime.lang as sgl  # or: import sglang as sgl

    @sgl.function
    def capital(s, country):
        s += "The capital of " + country + " is" + sgl.gen("city", max_tokens=8, stop=".")

    sgl.set_default_backend(sgl.RuntimeEndpoint("http://127.0.0.1:30000"))
    print(capital.run(country="France", temperature=0)["city"])

or, without a server, ``sgl.set_default_backend(sgl.Runtime(model_path="embedded"))``.
The language is SGLang's (Zheng et al., 2024); ``docs/howto/from_sglang.md`` names the differences.
"""

from __future__ import annotations

from typing import Any

from sps_runtime import __version__
from sps_runtime.lang.backend import Backend
from sps_runtime.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from sps_runtime.lang.endpoint import RuntimeEndpoint, ServerError
from sps_runtime.lang.function import Function, function
from sps_runtime.lang.settings import global_config
from sps_runtime.lang.state import ForkedStates, ProgramState
from sps_runtime.lang.words import (
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)


def set_default_backend(backend: Any) -> None:
    """Run programs on `backend` unless they name another: a `Backend`, or a `Runtime`."""
    global_config.default_backend = backend


def flush_cache(backend: Any = None) -> None:
    """Have `backend`, or the default one, drop what it has cached."""
    global_config.backend(backend).flush_cache()


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """What `backend`, or the default one, says about itself."""
    return global_config.backend(backend).get_server_info()


def __getattr__(name: str) -> Any:
    """`Runtime` and `EngineBackend` come with the engine only when asked for."""
    if name in ("Runtime", "EngineBackend"):
        from sps_runtime.lang import in_process

        return getattr(in_process, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Backend",
    "ChoicesDecision",
    "ChoicesSamplingMethod",
    "ForkedStates",
    "Function",
    "ProgramState",
    "RuntimeEndpoint",
    "ServerError",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "global_config",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]

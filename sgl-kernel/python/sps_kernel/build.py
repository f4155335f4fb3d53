"""What this build holds and what this processor offers."""

from __future__ import annotations

from sps_kernel import _core


def cpu_features() -> dict[str, bool]:
    """Features that matter to the kernels, by name, as the processor and the OS report them.

    Keys: ``avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni amx_bf16``.
    """
    return _core.cpu_features()


def available_isas() -> list[str]:
    """Compiled instruction sets that this processor runs, worst first.

    Of ``generic``, ``avx2``, ``avx512``, ``avx512_bf16``.
    """
    return _core.available_isas()


def current_isa() -> str:
    """The instruction set in use (the best one unless :func:`set_isa` chose)."""
    return _core.current_isa()


def set_isa(name: str) -> None:
    """Use one of :func:`available_isas` in this process from now on; for tests and comparisons.

    Raises ``ValueError`` when it is not available.
    """
    _core.set_isa(name)


def set_pool_spin(seconds: float) -> None:
    """How long idle threads of this process's pool look for work before they sleep; 0 at first.

    For processes whose threads have cores of their own: between two kernels of a decode step lie
    microseconds, less than a waking takes. Raises ``ValueError`` outside of [0, 1).
    """
    _core.set_pool_spin(seconds)


def build_info() -> dict[str, str | bool | list[str]]:
    """How the extension was built, and what of it is in use, for reports such as ``sps doctor``."""
    return {
        "compiler": _core.compiler,
        "sanitized": _core.sanitized,
        "isas": _core.available_isas(),
        "isa": _core.current_isa(),
    }

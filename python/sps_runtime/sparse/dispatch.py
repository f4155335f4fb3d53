"""Which implementation of `SparseOperators` a rank uses."""

from __future__ import annotations

import importlib
from types import ModuleType

from sps_runtime.sparse.kernel_operators import KernelSparseOperators
from sps_runtime.sparse.operators import SparseOperators
from sps_runtime.sparse.torch_operators import TorchOperators


def choose_operators(kernels: ModuleType | None, threads: int = 1) -> SparseOperators:
    """The kernels' where there are any.

    Args:
        kernels: the kernel package; None where there is none (`ops.dispatch`).
        threads: threads of one call.
    """
    return TorchOperators() if kernels is None else KernelSparseOperators(kernels, threads)


def device_operators() -> SparseOperators | None:
    """Those of a GPU: Triton's; None where it is not installed."""
    try:
        found = importlib.import_module("sps_runtime.sparse.triton_operators")
    except ImportError:
        return None
    operators: SparseOperators = found.TritonSparseOperators()
    return operators


def possible(page_size: int, head_dim: int, *, native: bool) -> bool:
    """Whether pages of this shape have summaries.

    Args:
        native: pages hold the model's own dtype.
    """
    whole = page_size % 64 == 0 or 64 % page_size == 0
    return native and whole and head_dim % 4 == 0

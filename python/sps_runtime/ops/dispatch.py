"""Which implementation of the operators this process uses: chosen once, passed on as an object."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from sps_runtime.ops.operators import TORCH, KernelOperators, Operators

Choice = Literal["auto", "sps_kernel", "torch"]


@dataclass(frozen=True)
class Ops:
    """What was chosen.

    Attributes:
        name: ``sps_kernel`` or ``torch``.
        kernels: the kernel package; None with torch.
        reason: one line on why, for `sps doctor` and the log.
        operators: what layers call.
    """

    name: str
    kernels: ModuleType | None
    reason: str
    operators: Operators = TORCH


def choose_ops(choice: Choice = "auto", threads: int = 1) -> Ops:
    """Look for the kernel package and decide.

    Args:
        choice: ``auto`` takes the kernels where they can be imported.
        threads: threads of one call; 1 where ranks fill the cores.

    Raises:
        ImportError: `choice` is ``sps_kernel`` and it cannot be imported.
    """
    if choice == "torch":
        return Ops("torch", None, "torch was asked for")
    try:
        kernels = importlib.import_module("sps_kernel")
    except ImportError as error:
        if choice == "sps_kernel":
            raise
        return Ops("torch", None, f"sps_kernel cannot be imported ({error}); all is slower")
    operators = KernelOperators(kernels, threads)
    return Ops("sps_kernel", kernels, "sps_kernel was found", operators)

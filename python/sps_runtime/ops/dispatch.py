"""Which implementation of the operators this process uses: chosen once, passed on as an object."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

Choice = Literal["auto", "sps_kernel", "torch"]


@dataclass(frozen=True)
class Ops:
    """What was chosen.

    Attributes:
        name: ``sps_kernel`` or ``torch``.
        kernels: the kernel package; None with torch.
        reason: one line on why, for `sps doctor` and the log.
    """

    name: str
    kernels: ModuleType | None
    reason: str


def choose_ops(choice: Choice = "auto") -> Ops:
    """Look for the kernel package and decide.

    Args:
        choice: ``auto`` takes the kernels where they can be imported.

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
        return Ops("torch", None, f"sps_kernel cannot be imported ({error}); attention is slower")
    return Ops("sps_kernel", kernels, "sps_kernel was found")

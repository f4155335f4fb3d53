"""Which implementation of the operators this process uses: chosen once, passed on as an object."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from sps_runtime.ops.operators import TORCH, KernelOperators, Operators

Choice = Literal["auto", "sps_kernel", "triton", "torch"]


@dataclass(frozen=True)
class Ops:
    """What was chosen.

    Attributes:
        name: ``sps_kernel`` (CPU tensors), ``triton`` (CUDA tensors) or ``torch`` (both).
        kernels: the kernel package; None with the others.
        reason: one line on why, for `sps doctor` and the log.
        operators: what layers call.
    """

    name: str
    kernels: ModuleType | None
    reason: str
    operators: Operators = TORCH


def choose_ops(
    choice: Choice = "auto", threads: int = 1, device: torch.device | str = "cpu"
) -> Ops:
    """Look for the kernel package and decide.

    Args:
        choice: ``auto`` takes the kernels for the device where they can be imported.
        threads: threads of one call; 1 where ranks fill the cores.
        device: where the rank's tensors lie.

    Raises:
        ImportError: `choice` names kernels that cannot be imported.
    """
    if choice == "torch":
        return Ops("torch", None, "torch was asked for")
    if choice == "triton" or (choice == "auto" and torch.device(device).type != "cpu"):
        return _triton(required=choice == "triton")
    try:
        kernels = importlib.import_module("sps_kernel")
    except ImportError as error:
        if choice == "sps_kernel":
            raise
        return Ops("torch", None, f"sps_kernel cannot be imported ({error}); all is slower")
    operators = KernelOperators(kernels, threads)
    return Ops("sps_kernel", kernels, "sps_kernel was found", operators)


def _triton(required: bool) -> Ops:
    try:
        module = importlib.import_module("sps_runtime.ops.triton.operators")
    except ImportError as error:
        if required:
            raise
        return Ops("torch", None, f"triton cannot be imported ({error}); all is slower")
    return Ops("triton", None, "triton was found", module.TritonOperators())

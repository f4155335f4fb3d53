"""From what is installed, and from a model's shapes, to the attention backend of a rank."""

from __future__ import annotations

import importlib

import torch

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops.dispatch import Ops
from sps_runtime.types.errors import ConfigError

ON_DEVICES = ("flashinfer", "triton", "torch")
"""Backends of GPUs, the fastest first."""


def choose_backend(
    ops: Ops, *, page_size: int, head_dim: int, threads: int = 1
) -> AttentionBackend:
    """The CPU backend.

    Args:
        ops: what was found (`ops.dispatch.choose_ops`).
        page_size, head_dim: the kernels take pages of a multiple of 16 tokens and heads of a
            multiple of 8 up to 512; others run in torch.
        threads: threads of one call; 1 where ranks fill the cores.
    """
    if ops.kernels is None or page_size % 16 or head_dim % 8 or head_dim > 512:
        return TorchBackend()
    return KernelBackend(ops.kernels, threads)


def choose_device_backend(
    choice: str,
    device: torch.device,
    *,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: str = "auto",
) -> AttentionBackend:
    """The backend of a rank on a GPU.

    Args:
        choice: ``auto`` or one of `ON_DEVICES`.
        dtype: of queries.
        kv_dtype: of pages, as `config.cache` has it.

    Raises:
        ConfigError: what was asked for cannot be had here.
    """
    reasons = []
    for name in ON_DEVICES if choice == "auto" else (choice,):
        try:
            if name == "flashinfer" and kv_dtype == "int8":
                raise ConfigError("FlashInfer reads no int8 pages")
            return _device_backend(name, device, dtype, head_dim)
        except (ImportError, ConfigError) as error:
            reasons.append(f"{name}: {error}")
    raise ConfigError(f"attention backend {choice} cannot be had: {'; '.join(reasons)}")


def _device_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    if name == "torch":
        return TorchBackend()
    if name == "triton":
        found = importlib.import_module("sps_runtime.attention.triton")
        backend: AttentionBackend = found.TritonBackend()
        return backend
    if name != "flashinfer":
        raise ConfigError(f"{name} is none of {', '.join(ON_DEVICES)}")
    if dtype not in (torch.bfloat16, torch.float16) or head_dim not in (64, 128, 256):
        raise ConfigError(f"FlashInfer computes no heads of {head_dim} in {dtype}")
    library = importlib.import_module("flashinfer")
    return FlashInferBackend(library, _without_flashinfer(), device)


def _without_flashinfer() -> AttentionBackend:
    """What computes lists that FlashInfer cannot."""
    try:
        found = importlib.import_module("sps_runtime.attention.triton")
    except ImportError:
        return TorchBackend()
    backend: AttentionBackend = found.TritonBackend()
    return backend

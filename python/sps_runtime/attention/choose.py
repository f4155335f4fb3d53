"""From what is installed, and from a model's shapes, to the attention backend of a rank."""

from __future__ import annotations

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops.dispatch import Ops


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

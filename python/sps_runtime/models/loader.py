"""From a model directory to a model: the weights are read once and shared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sps_runtime.config.model import ModelConfig
from sps_runtime.models.arena import (
    Arena,
    create_shared_arena,
    open_shared_arena,
    private_arena,
)
from sps_runtime.models.checkpoint import RandomWeights, SafetensorsCheckpoint, TensorSource
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.fill import fill as fill_arena
from sps_runtime.models.layout import plan_layout
from sps_runtime.models.registry import model_class
from sps_runtime.models.weights import Weights
from sps_runtime.ops.operators import TORCH, Operators

LoadFormat = Literal["auto", "safetensors", "dummy"]


@dataclass(frozen=True)
class LoadSpec:
    """What to load.

    Attributes:
        directory: a model directory (`config.hub.resolve_model_path`).
        dtype: ``auto``, ``bfloat16`` or ``float32``.
        load_format: ``dummy`` draws weights from `seed` and needs only the configuration.
        tp_size: TP ranks that the weights are cut for.
    """

    directory: Path
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
    seed: int = 0
    tp_size: int = 1


@dataclass(frozen=True)
class SharedWeights:
    """The memfd that the ranks of a host share.

    Attributes:
        fd: inherited from the launcher, empty at first.
        first: whether this rank is the one that fills it.
    """

    fd: int
    first: bool


def load_weights(config: ModelConfig, spec: LoadSpec, shared: SharedWeights | None = None) -> Arena:
    """The weights of all TP ranks, in shared memory or, without `shared`, in private memory.

    Raises:
        ConfigError: when the checkpoint is missing, broken, or not what config.json says.
    """
    dtype: torch.dtype = getattr(torch, config.resolve_dtype(spec.dtype))
    layout = plan_layout(config, spec.tp_size, dtype)

    def fill(arena: Arena) -> None:
        fill_arena(arena, _source(spec))

    if shared is None:
        return private_arena(layout, fill)
    if shared.first:
        return create_shared_arena(layout, shared.fd, fill)
    return open_shared_arena(layout, shared.fd)


def build_model(
    config: ModelConfig,
    arena: Arena,
    tp_rank: int = 0,
    device: str | torch.device = "cpu",
    ops: Operators = TORCH,
) -> Decoder:
    """The model of one TP rank over an arena's memory (copied to `device` where that is no CPU).

    Args:
        ops: what its layers compute with.
    """
    tensors, matrices = arena.tensors(tp_rank), arena.matrices(tp_rank)
    if torch.device(device).type != "cpu":
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        matrices = {name: weight.to(device) for name, weight in matrices.items()}
    weights = Weights(config, arena.layout.tp_size, tensors, matrices, arena.layout.unit, ops)
    return model_class(config.architecture)(weights)


def load_model(
    config: ModelConfig,
    spec: LoadSpec,
    tp_rank: int = 0,
    shared: SharedWeights | None = None,
    device: str | torch.device = "cpu",
    ops: Operators = TORCH,
) -> Decoder:
    """`load_weights`, then `build_model`."""
    return build_model(config, load_weights(config, spec, shared), tp_rank, device, ops)


def _source(spec: LoadSpec) -> TensorSource:
    if spec.load_format == "dummy":
        return RandomWeights(spec.seed)
    return SafetensorsCheckpoint(spec.directory)

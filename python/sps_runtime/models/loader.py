"""From a model directory to a model: the weights are read once and shared."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sps_runtime.config.model import ModelConfig
from sps_runtime.models.arena import (
    Arena,
    create_shared_arena,
    first_rank,
    open_shared_arena,
    private_arena,
)
from sps_runtime.models.checkpoint import RandomWeights, SafetensorsCheckpoint, TensorSource
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.fill import fill as fill_arena
from sps_runtime.models.layout import Layout, plan_layout
from sps_runtime.models.registry import model_class
from sps_runtime.models.weight_cache import WeightCache, cache_key, keep_in_background
from sps_runtime.models.weights import Weights
from sps_runtime.ops.operators import TORCH, Operators
from sps_runtime.ops.packing import Quantization
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "dummy"]


@dataclass(frozen=True)
class LoadSpec:
    """What to load.

    Attributes:
        directory: a model directory (`config.hub.resolve_model_path`).
        dtype: ``auto``, ``bfloat16`` or ``float32``.
        load_format: ``dummy`` draws weights from `seed` and needs only the configuration.
        tp_size: TP ranks that the weights are cut for.
        sp_size: SP ranks that may share a weight's columns.
        quantization: ``int8`` and ``int4`` need operators that pack.
        cache_dir: where packed weights are kept for the next start; None: nowhere.
        cache_from_bytes: smaller weights are packed as fast as a file is found.
    """

    directory: Path
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
    seed: int = 0
    tp_size: int = 1
    sp_size: int = 1
    quantization: Quantization = "none"
    cache_dir: Path | None = None
    cache_from_bytes: int = 64 << 20


@dataclass(frozen=True)
class SharedWeights:
    """The memfd that the ranks of a host share.

    Attributes:
        fd: inherited from the launcher, empty at first.
        first: whether this rank is the one that fills it.
    """

    fd: int
    first: bool


def load_weights(
    config: ModelConfig,
    spec: LoadSpec,
    shared: SharedWeights | None = None,
    ops: Operators = TORCH,
) -> Arena:
    """The weights of all TP ranks, in shared memory or, without `shared`, in private memory.

    Args:
        ops: what will multiply by them: weights are packed as it wants them.

    Raises:
        ConfigError: when the checkpoint is missing, broken, or not what config.json says.
    """
    layout = _plan(config, spec, ops)

    def fill(arena: Arena) -> None:
        fill_arena(arena, _source(spec))

    if shared is None:
        return private_arena(layout, fill)
    if not shared.first:
        return open_shared_arena(layout, shared.fd)
    with first_rank(layout, shared.fd):
        packing = layout.packing
        if spec.cache_dir is None or packing is None or layout.nbytes < spec.cache_from_bytes:
            return create_shared_arena(layout, shared.fd, fill)
        cache = WeightCache(spec.cache_dir, packing.checksum)
        key = cache_key(layout, packing, _source(spec).identity())
        kept = False

        def load_or_fill(arena: Arena) -> None:
            nonlocal kept
            kept = cache.load(key, arena.memory)
            if not kept:
                fill(arena)

        arena = create_shared_arena(layout, shared.fd, load_or_fill)
        if not kept:
            keep_in_background(cache, key, arena.memory, shared.fd)
        return arena


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
    return build_model(config, load_weights(config, spec, shared, ops), tp_rank, device, ops)


def load_model_on(
    config: ModelConfig, spec: LoadSpec, tp_rank: int, device: torch.device, ops: Operators
) -> Decoder:
    """One TP rank's model over weights of its own on a GPU, and none of its peers'."""
    layout = _plan(config, spec, ops).slice(tp_rank)

    def fill(arena: Arena) -> None:
        fill_arena(arena, _source(spec, device))

    return build_model(config, private_arena(layout, fill, device), tp_rank, device, ops)


def _plan(config: ModelConfig, spec: LoadSpec, ops: Operators) -> Layout:
    dtype: torch.dtype = getattr(torch, config.resolve_dtype(spec.dtype))
    packing = ops.packing(spec.quantization)
    if spec.quantization != "none" and packing is None:
        raise ConfigError(f"quantization {spec.quantization} needs sps_kernel (see `sps doctor`)")
    layout = plan_layout(config, spec.tp_size, dtype, packing, spec.sp_size)
    plain = sorted({name for name, entry in layout.of(0, linear=True) if not entry.kind})
    if plain and spec.quantization != "none":
        logger.warning("not quantized, shares would cut groups: %s", ", ".join(plain))
    return layout


def _source(spec: LoadSpec, device: torch.device | None = None) -> TensorSource:
    if spec.load_format == "dummy":
        return RandomWeights(spec.seed, device=device)
    return SafetensorsCheckpoint(spec.directory, device)

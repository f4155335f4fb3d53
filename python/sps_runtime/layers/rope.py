"""Rotary position embedding (Su et al. 2021) with the scalings of today's checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sps_runtime.config.rope import RopeConfig
from sps_runtime.ops.elementwise import Rotate
from sps_runtime.ops.operators import Operators


class RotaryEmbedding:
    """Positions -> the rotation of a step, for all its layers.

    Angles are fp32 products of position and frequency, as in transformers.
    """

    def __init__(
        self, config: RopeConfig, head_dim: int, device: torch.device, ops: Operators
    ) -> None:
        frequencies, self.scale = _frequencies(config, head_dim)
        self.frequencies_F = frequencies.to(device)
        self._ops = ops

    def __call__(self, positions_T: Tensor, dtype: torch.dtype) -> Rotate:
        return self._ops.rotation(positions_T, self.frequencies_F, self.scale, dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """``[head_dim / 2]`` fp32 radians per position, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, plain), 1.0
    if config.kind == "yarn":
        return _yarn(config, plain), _yarn_scale(config)
    return plain, 1.0


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by factor, short ones kept, others blended."""
    wavelengths = 2 * math.pi / plain
    turns = config.original_positions / wavelengths
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * plain / config.factor + smooth * plain
    scaled = torch.where(
        wavelengths > config.original_positions / low, plain / config.factor, plain
    )
    between = (turns >= low) & (turns <= high)
    return torch.where(between, blended, scaled)


def _yarn(config: RopeConfig, plain: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023), "NTK by parts": interpolate dims that turn less than beta_slow times
    over the original context, keep those that turn more than beta_fast times, ramp between."""
    half = plain.numel()
    head_dim = 2 * half

    def dim_of(rotations: float) -> float:
        ratio = config.original_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast), dim_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _yarn_scale(config: RopeConfig) -> float:
    """The factor on cos and sin that stands for YaRN's attention temperature."""
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(mscale: float) -> float:
        if config.factor <= 1:
            return 1.0
        return 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)

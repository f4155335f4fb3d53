"""Rotary position embedding settings, in the old and the new spelling of config.json.

Up to version 4 transformers writes ``rope_theta`` and ``rope_scaling``, from version 5 on one
object ``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from sps_runtime.types.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of rope: theta ** (-2i / head_dim), scaled by kind.

    Attributes:
        kind: ``default``; ``linear`` (position interpolation, Chen et al. 2023); ``llama3`` (long
            wavelengths divided by factor, Llama 3.1); ``yarn`` (Peng et al. 2023).
        factor: how much longer the context becomes.
        original_positions: the context before scaling (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's band of wavelengths that is blended.
        beta_fast, beta_slow, truncate: yarn's band, in rotations over the original context.
        attention_factor, mscale, mscale_all_dim: yarn's scaling of cos and sin; None: derived.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def context_length(self, max_position_embeddings: int) -> int:
        """Positions the model can tell apart. Llama 3's files tell the scaled length already."""
        if self.kind == "linear":
            return int(max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_positions * self.factor))
        return max_position_embeddings


def parse_rope(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """The rope settings of a config.json.

    Raises:
        ConfigError: for a kind that is not served (``dynamic`` changes keys that are cached
            already as a sequence grows), partial rotation, or a field of the wrong type.
    """
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(told, Mapping):
        raise ConfigError("config.json: rope_scaling must be an object")
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind not in KINDS:
        raise ConfigError(
            f"config.json: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}"
        )
    partial = told.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported")
    original = told.get("original_max_position_embeddings")
    if original is None:
        original = config.get("original_max_position_embeddings") or max_position_embeddings
    factor = _number(told, "factor", 1.0)
    if kind == "yarn" and told.get("factor") is None:
        factor = max_position_embeddings / original
    return RopeConfig(
        theta=_number(told, "rope_theta", _number(config, "rope_theta", 10000.0)),
        kind=cast(RopeKind, kind),
        factor=factor,
        original_positions=int(original),
        low_freq_factor=_number(told, "low_freq_factor", 1.0),
        high_freq_factor=_number(told, "high_freq_factor", 4.0),
        beta_fast=_number(told, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(told, "beta_slow", 0.0) or 1.0,
        truncate=bool(told.get("truncate", True)),
        attention_factor=_optional(told, "attention_factor"),
        mscale=_optional(told, "mscale"),
        mscale_all_dim=_optional(told, "mscale_all_dim"),
    )


def _optional(told: Mapping[str, Any], name: str) -> float | None:
    value = told.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: rope {name} must be a number, not {value!r}")
    return float(value)


def _number(told: Mapping[str, Any], name: str, default: float) -> float:
    value = _optional(told, name)
    return default if value is None else value

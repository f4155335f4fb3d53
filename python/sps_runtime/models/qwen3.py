"""Qwen3, dense (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from sps_runtime.layers.attention import Attention
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.weights import Weights


class Qwen3ForCausalLM(Decoder):
    """RMS norm of every head of q and k; some layers may see a sliding window."""

    def attention(self, weights: Weights, layer: int) -> Attention:
        return replace(
            super().attention(weights, layer),
            window=weights.config.layer_windows[layer],
            q_norm=weights.norm(f"layers.{layer}.q_norm"),
            k_norm=weights.norm(f"layers.{layer}.k_norm"),
        )

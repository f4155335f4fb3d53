"""Qwen2 and Qwen2.5 (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from sps_runtime.layers.attention import Attention
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.weights import Weights


class Qwen2ForCausalLM(Decoder):
    """Biases on q, k and v; some layers may see a sliding window."""

    def attention(self, weights: Weights, layer: int) -> Attention:
        plain = super().attention(weights, layer)
        return replace(plain, window=weights.config.layer_windows[layer])

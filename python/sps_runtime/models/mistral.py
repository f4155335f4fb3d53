"""Mistral 7B (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from sps_runtime.layers.attention import Attention
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.weights import Weights


class MistralForCausalLM(Decoder):
    """A Llama whose every layer sees a sliding window, where config.json sets one."""

    def attention(self, weights: Weights, layer: int) -> Attention:
        plain = super().attention(weights, layer)
        return replace(plain, window=weights.config.layer_windows[layer])

"""Llama 2 (Touvron et al. 2023) and Llama 3 (Grattafiori et al. 2024)."""

from __future__ import annotations

from sps_runtime.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """The plain decoder: full attention everywhere; biases where config.json wants them."""

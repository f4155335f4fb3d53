"""Which class computes which architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sps_runtime.registry import resolve

if TYPE_CHECKING:
    from sps_runtime.models.decoder import Decoder

MODELS: Mapping[str, str] = {
    "LlamaForCausalLM": "sps_runtime.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "sps_runtime.models.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": "sps_runtime.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "sps_runtime.models.qwen3:Qwen3ForCausalLM",
}


def model_class(architecture: str) -> type[Decoder]:
    """Import the class of `architecture`.

    Raises:
        ConfigError: for an architecture that neither `MODELS` nor a plug-in knows.
    """
    found: type[Decoder] = resolve("model", MODELS, architecture)
    return found

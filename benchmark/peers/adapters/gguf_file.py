"""Write a Hugging Face directory of Qwen2's architecture as a bf16 GGUF file, tokenizer left out.

Prompts are token ids, so no vocabulary is needed; llama.cpp's converter wants a known one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a checkpoint's tensor. Raises KeyError for an unknown one."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{INNER[module]}.{kind}"


def bf16_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, uint16 array of bf16 bits) of every tensor of a safetensors file."""
    import numpy

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    bits = numpy.memmap(path, dtype=numpy.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, only BF16 is converted")
        begin, end = entry["data_offsets"]
        yield name, numpy.asarray(bits[begin:end]).view(numpy.uint16).reshape(entry["shape"])


def write_gguf(model: Path, target: Path) -> None:
    """Write `target`; matrices stay bf16, vectors become fp32 as llama.cpp wants them."""
    import gguf
    import numpy

    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen2":
        raise ValueError(f"{config['model_type']} is not converted, only qwen2")
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in bf16_tensors(model / "model.safetensors"):
        if bits.ndim == 1:
            wide = bits.astype(numpy.uint32) << numpy.uint32(16)
            writer.add_tensor(gguf_name(name), wide.view(numpy.float32))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), bits.view(numpy.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

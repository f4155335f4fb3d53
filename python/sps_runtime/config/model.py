"""What a checkpoint says about its model: config.json and generation_config.json, without torch.

The field names of Hugging Face's files end here; the rest of the package reads `ModelConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.rope import RopeConfig, parse_rope
from sps_runtime.types.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Architecture:
    """What an architecture's name alone says, beyond what config.json says.

    Attributes:
        qkv_bias, output_bias: whether q, k, v and o have biases; None: as ``attention_bias`` says.
        mlp_bias: whether ``mlp_bias`` is heeded.
        qk_norm: RMS norm of every head of q and k before rope.
        windows: how sliding windows are told: ``none``, ``all`` layers, or ``layers`` by
            ``use_sliding_window`` with ``layer_types`` or ``max_window_layers``.
    """

    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool
    qk_norm: bool
    windows: str


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(None, None, True, False, "none"),
    "MistralForCausalLM": Architecture(False, False, False, False, "all"),
    "Qwen2ForCausalLM": Architecture(True, False, False, False, "layers"),
    "Qwen3ForCausalLM": Architecture(None, None, False, True, "layers"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, as its checkpoint describes it.

    Attributes:
        architecture: a name in `ARCHITECTURES`.
        rope: rotary position embedding.
        layer_windows: per layer the sliding window in tokens (a query sees keys at positions >
            its own - window), None for full attention.
        qkv_bias, output_bias, mlp_bias, qk_norm: which optional weights exist.
        eos_token_ids: ids that end a generation, of both files, ascending.
        bos_token_id: None where there is none.
        dtype: the checkpoint's own, one of `DTYPES`.
        sampling_defaults: (name, value) of generation_config.json, names of `SAMPLING_DEFAULTS`.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"
    sampling_defaults: tuple[tuple[str, float], ...] = ()

    @property
    def context_length(self) -> int:
        """Positions that the model can tell apart, what its rope scaling adds included."""
        return self.rope.context_length(self.max_position_embeddings)

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def heads_per_rank(self, tp_size: int) -> int:
        """Query heads of one TP rank."""
        return self.num_heads // tp_size

    def kv_heads_per_rank(self, tp_size: int) -> int:
        """KV heads of one TP rank; with more ranks than KV heads each head is on several."""
        return max(1, self.num_kv_heads // tp_size)

    def resolve_dtype(self, wanted: str) -> str:
        """The dtype to compute in: `wanted`, or for ``auto`` the checkpoint's own.

        float16 checkpoints run in bfloat16, whose range holds every float16.

        Raises:
            ConfigError: for a dtype that is not served.
        """
        dtype = self.dtype if wanted == "auto" else wanted
        if wanted == "auto" and dtype == "float16":
            return "bfloat16"
        if dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype {wanted!r} is not one of auto, bfloat16, float32")
        return dtype


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the configuration in a Hugging Face model directory.

    Raises:
        ConfigError: when the directory, config.json or a needed field is missing or of the wrong
            type, or the model is of a kind that is not served (the message names those that are).
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"model path {str(path)!r} is not a directory")
    generation: dict[str, Any] = {}
    if (directory / "generation_config.json").is_file():
        generation = _read_json(directory / "generation_config.json")
    return parse_model_config(_read_json(directory / "config.json"), generation)


def parse_model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """`load_model_config` of the two files' contents."""
    fields, generation = _Fields(config, "config.json"), generation or {}
    name, architecture = _architecture(fields)
    _refuse_variants(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads", heads)
    layers = fields.integer("num_hidden_layers")
    head_dim = fields.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads do not divide over {kv_heads} KV heads")
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rope turns pairs of dims")
    positions = fields.integer("max_position_embeddings")
    bias = bool(config.get("attention_bias"))
    return ModelConfig(
        architecture=name,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=positions,
        rope=parse_rope(config, positions),
        layer_windows=_layer_windows(fields, architecture, layers),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias if architecture.qkv_bias is None else architecture.qkv_bias,
        output_bias=bias if architecture.output_bias is None else architecture.output_bias,
        mlp_bias=architecture.mlp_bias and bool(config.get("mlp_bias")),
        qk_norm=architecture.qk_norm,
        eos_token_ids=_eos_ids(config, generation),
        bos_token_id=_first_id(config.get("bos_token_id", generation.get("bos_token_id"))),
        dtype=_dtype(config),
        sampling_defaults=_sampling_defaults(generation),
    )


def check_degrees(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ConfigError unless the model's weights divide over the TP ranks.

    SP degrees always work: tokens, and with SP-TP whole heads and columns, are dealt in shares that
    may differ by one.
    """
    tp = parallel.tp_size
    if model.num_heads % tp:
        raise ConfigError(f"tp_size {tp} does not divide the model's {model.num_heads} heads")
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise ConfigError(
            f"tp_size {tp} neither divides the model's {model.num_kv_heads} KV heads "
            "nor is a multiple of them"
        )
    if model.intermediate_size % tp:
        raise ConfigError(
            f"tp_size {tp} does not divide the model's intermediate_size {model.intermediate_size}"
        )
    if parallel.arch == "tp" and parallel.sp_size * tp > model.num_heads:
        raise ConfigError(
            f"sp_arch tp spreads {model.num_heads} heads over sp_size x tp_size = "
            f"{parallel.sp_size * tp} ranks: some would have none"
        )


class _Fields:
    """Typed access to a JSON object, with errors that name the field and the file."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values, self.file = values, file

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.file}: {name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.file}: {name} must be a number, not {value!r}")
        return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: this is no Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def _architecture(fields: _Fields) -> tuple[str, Architecture]:
    names = fields.values.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    told = ", ".join(map(str, names)) or "none"
    raise ConfigError(
        f"config.json: architecture {told} is not supported; supported are "
        + ", ".join(sorted(ARCHITECTURES))
    )


def _refuse_variants(fields: _Fields) -> None:
    """Refuse what would load and then compute something else."""
    config = fields.values
    if config.get("quantization_config"):
        raise ConfigError("config.json: quantized checkpoints are not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported, only silu")


def _layer_windows(
    fields: _Fields, architecture: Architecture, layers: int
) -> tuple[int | None, ...]:
    config = fields.values
    full: tuple[int | None, ...] = (None,) * layers
    if architecture.windows == "none":
        return full
    if architecture.windows == "all":
        if config.get("sliding_window", 4096) is None:
            return full
        return (fields.integer("sliding_window", 4096),) * layers
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return full
    window = fields.integer("sliding_window", 4096)
    types = config.get("layer_types")
    if types is None:
        first = int(config.get("max_window_layers", 28))
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ConfigError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of "
            f"{layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(f"token ids must be integers, not {value!r}")
    return tuple(values)


def _first_id(value: Any) -> int | None:
    ids = _ids(value)
    return ids[0] if ids else None


def _eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    told = (*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id")))
    return tuple(sorted(set(told)))


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = str(value).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"config.json: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype


def _sampling_defaults(generation: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (name, generation[name])
        for name in SAMPLING_DEFAULTS
        if isinstance(generation.get(name), int | float)
        and not isinstance(generation.get(name), bool)
    )

"""SGLang's flags that this server does not have.

A flag that would change what the server does is refused by name, unless its value is the one that
changes nothing. A flag that only tunes SGLang's own machinery is accepted and named in a warning,
so that existing start scripts go on working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sps_runtime.types.errors import ConfigError


@dataclass(frozen=True)
class Refusal:
    """Attributes:
    why: what the user should know.
    neutral: values that change nothing and are accepted.
    """

    why: str
    neutral: tuple[str, ...] = ()


_ONE_ENGINE = Refusal("one server is one engine; run several behind a router", ("1",))
_NO_LORA = Refusal("adapters are not supported; merge them into the weights")
_NO_SPECULATION = Refusal("speculative decoding is not supported", ("none",))
_NO_OFFLOAD = Refusal("KV lives in the ranks' pools only", ("0",))
_SEQUENCE = Refusal("use --sp-size, which spreads prefill and decode of one request", ("1",))
_NO_PD = Refusal("prefill and decode run on the same ranks", ("null", "none"))
_DENSE_ONLY = Refusal("mixture-of-experts models are not supported", ("1",))

REFUSED: Mapping[str, Refusal] = {
    "torchao-config": Refusal("use --quantization int8 or int4", ("",)),
    "quantization-param-path": Refusal("scales are computed when loading"),
    "dp-size": _ONE_ENGINE,
    "data-parallel-size": _ONE_ENGINE,
    "enable-dp-attention": _ONE_ENGINE,
    "pp-size": Refusal("pipeline parallelism is not supported; use --sp-size or --tp-size", ("1",)),
    "pipeline-parallel-size": Refusal("pipeline parallelism is not supported", ("1",)),
    "attn-cp-size": _SEQUENCE,
    "enable-prefill-cp": _SEQUENCE,
    "cp-strategy": Refusal("use --sp-strategy"),
    "dcp-size": _SEQUENCE,
    "ep-size": _DENSE_ONLY,
    "ep": _DENSE_ONLY,
    "expert-parallel-size": _DENSE_ONLY,
    "is-embedding": Refusal("this server generates text; it serves no embedding models"),
    "enable-multimodal": Refusal("this server takes text only"),
    "skip-tokenizer-init": Refusal("the server always tokenizes; /generate takes input_ids too"),
    "tokenizer-mode": Refusal("only tokenizer.json is read", ("auto",)),
    "model-impl": Refusal("models are this package's own", ("auto",)),
    "enable-lora": _NO_LORA,
    "lora-paths": _NO_LORA,
    "speculative-algorithm": _NO_SPECULATION,
    "speculative-draft-model-path": _NO_SPECULATION,
    "completion-template": Refusal("/v1/completions takes the prompt as it is"),
    "json-model-override-args": Refusal("edit config.json instead", ("{}",)),
    "preferred-sampling-params": Refusal("put defaults into generation_config.json"),
    "enable-custom-logit-processor": Refusal("requests never bring code"),
    "enable-return-hidden-states": Refusal("hidden states are not returned"),
    "allow-auto-truncate": Refusal("a prompt that is too long is an error, never cut"),
    "enable-priority-scheduling": Refusal("requests have no priorities"),
    "enable-hierarchical-cache": _NO_OFFLOAD,
    "enable-lmcache": _NO_OFFLOAD,
    "cpu-offload-gb": _NO_OFFLOAD,
    "disaggregation-mode": _NO_PD,
    "enable-trace": Refusal("traces are not exported yet"),
    "otlp-traces-endpoint": Refusal("traces are not exported yet"),
    "ssl-keyfile": Refusal("put a proxy in front for TLS"),
    "ssl-certfile": Refusal("put a proxy in front for TLS"),
    "root-path": Refusal("put a proxy in front that strips the prefix", ("",)),
    "custom-weight-loader": Refusal("weights are safetensors and nothing else"),
}

IGNORED: Mapping[str, int] = {
    # name: how many values follow it (-1: all up to the next flag)
    "trust-remote-code": 0,
    "skip-server-warmup": 0,
    "warmups": 1,
    "sampling-backend": 1,
    "log-level-http": 1,
    "log-requests-level": 1,
    "crash-dump-folder": 1,
    "decode-log-interval": 1,
    "show-time-cost": 0,
    "tokenizer-worker-num": 1,
    "nccl-port": 1,
    "dist-timeout": 1,
    "gpu-id-step": 1,
    "sleep-on-idle": 0,
    "stream-output": 0,
    "cuda-graph-max-bs": 1,
    "cuda-graph-bs": -1,
    "disable-cuda-graph-padding": 0,
    "disable-custom-all-reduce": 0,
    "disable-outlines-disk-cache": 0,
    "enable-mixed-chunk": 0,
    "enable-torch-compile": 0,
    "torch-compile-max-bs": 1,
    "enable-p2p-check": 0,
    "enable-nccl-nvls": 0,
    "enable-memory-saver": 0,
    "num-continuous-decode-steps": 1,
    "triton-attention-num-kv-splits": 1,
    "scheduler-recv-interval": 1,
    "numa-node": -1,
    "model-loader-extra-config": 1,
    "weight-version": 1,
}


def sort_out(unknown: Sequence[str]) -> list[str]:
    """Judge the arguments that the parser did not know; return the names of ignored flags.

    Raises:
        ConfigError: for a refused flag, and for one that nobody knows.
    """
    ignored = []
    for flag, values in _flags(unknown):
        name = flag.removeprefix("--")
        if name in IGNORED:
            expected = IGNORED[name]
            if 0 <= expected < len(values):
                raise ConfigError(f"unexpected argument {values[expected]!r}")
            ignored.append(flag)
        elif name in REFUSED:
            refusal = REFUSED[name]
            if not values or any(value.lower() not in refusal.neutral for value in values):
                told = " ".join([flag, *values])
                raise ConfigError(f"{told} is not supported: {refusal.why}")
        else:
            raise ConfigError(f"unknown argument {flag}")
    return ignored


def _flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            raise ConfigError(f"unexpected argument {argument!r}")
    return found

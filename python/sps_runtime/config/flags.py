"""The command line of the server: SGLang's flag names where SGLang has one, and ours."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sps_runtime.config import environment
from sps_runtime.config.attention import add_attention_flags, attention_config
from sps_runtime.config.cache import KV_CACHE_DTYPES
from sps_runtime.config.options import EMBEDDED, EngineOptions
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.config.unsupported import sort_out
from sps_runtime.types.errors import ConfigError

ATTENTION_BACKENDS = ["auto", "sps_kernel", "torch", "flashinfer", "triton"]
_DTYPES = {"float": "float32", "bf16": "bfloat16", "fp32": "float32"}
_STRATEGIES = {"pass-kv": "pass_kv", "pass-q": "pass_q"}


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        ignored: flags that were accepted and do nothing here.
    """

    engine: EngineOptions
    server: ServerConfig
    allow_unauthenticated: bool
    ignored: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    """Errors are ConfigErrors: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(arguments: Sequence[str], program: str = "sps serve") -> Command:
    """Parse a server's command line; ``--config FILE`` stands in front of it.

    Raises:
        ConfigError: for what cannot be, in one line.
    """
    parser = make_parser(program)
    first, _ = parser.parse_known_args(arguments)
    if first.config:
        arguments = [*read_config_file(first.config), *arguments]
    parsed, unknown = parser.parse_known_args(arguments)
    ignored = sort_out(unknown)
    return Command(
        engine=_engine_options(parsed),
        server=_server_config(parsed),
        allow_unauthenticated=parsed.allow_unauthenticated,
        ignored=tuple(ignored),
    )


def read_config_file(path: str) -> list[str]:
    """Turn a YAML, TOML or JSON file of flag names and values into arguments.

    Raises:
        ConfigError: when it cannot be read or is no flat mapping.
    """
    file = Path(path)
    try:
        content = _load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold flag names with values")
    arguments: list[str] = []
    for name, value in content.items():
        flag = "--" + str(name).replace("_", "-").removeprefix("--")
        if isinstance(value, bool) or value is None:
            arguments += [flag] if value else []
        elif isinstance(value, str | int | float):
            arguments += [f"{flag}={value}"]
        else:
            raise ConfigError(f"--config {path}: {name} must be a single value")
    return arguments


def _load(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    match file.suffix:
        case ".json":
            return json.loads(text)
        case ".toml":
            return tomllib.loads(text)
        case ".yaml" | ".yml":
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
    raise ConfigError(f"--config {file}: the name must end in .yaml, .toml or .json")


def make_parser(program: str) -> argparse.ArgumentParser:
    """The parser of all flags that do something."""
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        description="Serve a model over SGLang's and OpenAI's HTTP APIs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", default="", help="file of flags: .yaml, .toml or .json")
    _add_model(parser.add_argument_group("model"))
    _add_parallel(parser.add_argument_group("ranks"))
    _add_memory(parser.add_argument_group("KV cache"))
    _add_scheduler(parser.add_argument_group("scheduling"))
    add_attention_flags(parser.add_argument_group("attention"))
    _add_server(parser.add_argument_group("HTTP"))
    _add_operations(parser.add_argument_group("operation"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model-path",
        "--model",
        default=EMBEDDED,
        help="directory with config.json and safetensors, a hub name, or 'embedded'",
    )
    add("--tokenizer-path", default="", help="directory of tokenizer.json, if another")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32", *_DTYPES])
    add("--load-format", default="auto", choices=["auto", "safetensors", "dummy"])
    add(
        "--quantization",
        default="none",
        choices=["none", "int8", "int4"],
        help="round weights of linear layers when loading, in groups of 64 (int4: head in int8)",
    )
    add(
        "--weight-cache-dir",
        default="auto",
        help="where packed weights are kept for the next start; auto: the user's cache; or none",
    )
    add("--context-length", type=int, help="longest prompt plus answer; the model's unless told")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "echo"], help=_ECHO_HELP)
    add("--attention-backend", default="auto", choices=ATTENTION_BACKENDS)
    add("--base-gpu-id", type=int, default=0, help="the first GPU that ranks of this host use")
    add(
        "--device-links",
        default="auto",
        choices=["auto", "nccl", "ipc", "host"],
        help="how ranks on GPUs of one host exchange tensors",
    )
    add(
        "--grammar-backend",
        default="llguidance",
        help="llguidance, xgrammar, none, or a plug-in's name",
    )
    add(
        "--disable-step-graphs",
        "--disable-cuda-graph",
        action="store_true",
        help="compute every decode step through the model's code; replay none",
    )
    add("--random-seed", type=int, default=0)
    add("--echo-delay", type=float, default=0.0, help="seconds of a step of --device echo")


_ECHO_HELP = "echo runs no model: ranks answer with hashes of what they read back, for tests"


def _add_parallel(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tp-size", "--tp", "--tensor-parallel-size", type=int, default=1)
    add(
        "--sp-size",
        "--sp",
        "--context-parallel-size",
        type=int,
        default=1,
        help="ranks over which one prompt's tokens are spread",
    )
    add("--sp-arch", default="ntp", choices=["ntp", "tp"], help="full or sharded linear weights")
    add(
        "--sp-strategy",
        default="auto",
        choices=["auto", "pass-kv", "pass-q", "ulysses"],
        help="how attention crosses ranks; auto measures",
    )
    add("--disable-sp-pipeline", action="store_true", help="between hosts: compute, then send")
    add("--nnodes", type=int, default=1, help="hosts")
    add("--node-rank", type=int, default=0)
    add("--dist-init-addr", default=None, help="host:port of node 0")
    add("--dist-key-file", default="", help="secret that the hosts share (or SPS_DIST_KEY)")
    add("--threads-per-rank", type=int, help="all cores, divided, unless told")
    add("--cpu-bind", default="auto", help="auto, none, or CPUs of each rank: 0-3|4-7")
    add("--no-core-binding", dest="cpu_bind", action="store_const", const="none")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--page-size", type=int, help="tokens of a page; 64 unless told")
    add("--max-total-tokens", type=int, help="tokens of KV over all ranks")
    add("--pages-per-rank", type=int, help="the same, in pages of one rank")
    add("--mem-fraction-static", type=float, help="share of free memory for KV")
    add("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="auto: the model's")
    add("--disable-radix-cache", action="store_true")
    add("--radix-eviction-policy", default="lru")


def _add_scheduler(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, SchedulerConfig()
    add("--max-running-requests", type=int, default=default.max_running_requests)
    add("--max-queued-requests", type=int, default=default.max_queued_requests)
    add(
        "--chunked-prefill-size",
        type=int,
        default=default.chunked_prefill_size,
        help="new tokens of one prompt, per rank and step; -1: whole prompts",
    )
    add("--max-prefill-tokens", type=int, default=default.max_prefill_tokens)
    add("--schedule-policy", default=default.schedule_policy, choices=["fcfs", "lpm"])
    add("--schedule-conservativeness", type=float, default=default.conservativeness)
    add("--policy", default=default.policy, help="how ranks are given to requests")
    add("--disable-overlap-schedule", action="store_true")


def _add_server(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, ServerConfig()
    add("--host", default=default.host)
    add("--port", type=int, default=default.port)
    add("--served-model-name", default="")
    add("--api-key", default="", help="visible in the process list: prefer --api-key-file")
    add("--admin-api-key", default="", help="also SPS_ADMIN_API_KEY")
    add("--api-key-file", default="", help="one key a line; also SPS_API_KEY")
    add("--allow-unauthenticated", action="store_true", help="other hosts without any key")
    add("--chat-template", default="", help="template file, if not the model's own")
    add(
        "--tool-call-parser", default="", help="hermes, qwen, llama3, mistral, none; or as it seems"
    )
    add("--reasoning-parser", default="", help="deepseek-r1, qwen3, qwen3-thinking, none")
    add("--stream-interval", type=int, default=default.stream_interval)
    add("--enable-metrics", action="store_true")
    add("--enable-cache-report", action="store_true")


def _add_operations(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", default="info", type=str.lower, choices=levels)
    add("--log-format", default="plain", choices=["plain", "json"])
    add("--trace-file", default="", help="timeline of every step, for ui.perfetto.dev")
    add("--log-requests", action="store_true", help="one line per request, never its text")
    add("--watchdog-timeout", type=float, default=300.0, help="seconds without progress")
    add("--drain-timeout", type=float, default=30.0, help="seconds that SIGTERM waits")


def _engine_options(parsed: argparse.Namespace) -> EngineOptions:
    dtype = _DTYPES.get(parsed.dtype, parsed.dtype)
    return EngineOptions(
        model_path=parsed.model_path,
        tokenizer_path=parsed.tokenizer_path,
        dtype=dtype,
        device=parsed.device,
        base_gpu_id=parsed.base_gpu_id,
        device_links=parsed.device_links,
        load_format=parsed.load_format,
        quantization=parsed.quantization,
        weight_cache_dir=parsed.weight_cache_dir,
        context_length=parsed.context_length,
        page_size=parsed.page_size,
        max_total_tokens=parsed.max_total_tokens,
        pages_per_rank=parsed.pages_per_rank,
        mem_fraction_static=parsed.mem_fraction_static,
        enable_prefix_cache=not parsed.disable_radix_cache,
        eviction=parsed.radix_eviction_policy,
        kv_cache_dtype=parsed.kv_cache_dtype,
        threads_per_rank=parsed.threads_per_rank,
        cpu_bind=parsed.cpu_bind,
        random_seed=parsed.random_seed,
        attention_backend=parsed.attention_backend,
        grammar_backend=parsed.grammar_backend,
        disable_step_graphs=parsed.disable_step_graphs,
        watchdog_timeout_s=parsed.watchdog_timeout,
        echo_delay_s=parsed.echo_delay,
        dist_key_file=parsed.dist_key_file,
        log_level=parsed.log_level,
        log_format=parsed.log_format,
        trace_file=parsed.trace_file,
        parallel=_parallel(parsed),
        scheduler=_scheduler(parsed),
        attention=attention_config(vars(parsed)),
    )


def _parallel(parsed: argparse.Namespace) -> ParallelConfig:
    strategy = _STRATEGIES.get(parsed.sp_strategy, parsed.sp_strategy)
    return ParallelConfig(
        sp_size=parsed.sp_size,
        tp_size=parsed.tp_size,
        arch=parsed.sp_arch,
        strategy=strategy,
        nnodes=parsed.nnodes,
        node_rank=parsed.node_rank,
        dist_init_addr=parsed.dist_init_addr,
        pipeline=not parsed.disable_sp_pipeline,
    )


def _scheduler(parsed: argparse.Namespace) -> SchedulerConfig:
    return SchedulerConfig(
        max_running_requests=parsed.max_running_requests,
        max_queued_requests=parsed.max_queued_requests,
        chunked_prefill_size=parsed.chunked_prefill_size,
        max_prefill_tokens=parsed.max_prefill_tokens,
        policy=parsed.policy,
        schedule_policy=parsed.schedule_policy,
        conservativeness=parsed.schedule_conservativeness,
        overlap=not parsed.disable_overlap_schedule,
        csa_min_tokens=parsed.csa_min_tokens,
    )


def _server_config(parsed: argparse.Namespace) -> ServerConfig:
    keys = [*environment.api_keys(), *([parsed.api_key] if parsed.api_key else [])]
    if parsed.api_key_file:
        keys += environment.read_key_file(parsed.api_key_file)
    admin = [*environment.admin_keys(), *([parsed.admin_api_key] if parsed.admin_api_key else [])]
    if parsed.stream_interval < 1:
        raise ConfigError("--stream-interval must be at least 1")
    return ServerConfig(
        host=parsed.host,
        port=parsed.port,
        served_model_name=parsed.served_model_name,
        api_key_hashes=environment.hash_keys(keys),
        admin_key_hashes=environment.hash_keys(admin),
        chat_template=parsed.chat_template,
        tool_call_parser=parsed.tool_call_parser,
        reasoning_parser=parsed.reasoning_parser,
        stream_interval=parsed.stream_interval,
        enable_metrics=parsed.enable_metrics,
        enable_cache_report=parsed.enable_cache_report,
        log_requests=parsed.log_requests,
        drain_timeout_s=parsed.drain_timeout,
    )

"""Settings of the HTTP process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Attributes:
    host, port: where HTTP listens; the socket itself is bound by the launcher and inherited.
    served_model_name: what /v1/models says and requests may name.
    api_key_hashes, admin_key_hashes: SHA-256 of each key, in hex; the keys themselves stay with
        who gave them. Both empty: no authentication.
    chat_template: path of a template file, or "" for the model's own.
    tool_call_parser: how the model writes tool calls (`frontend.parsing.tool_formats`), ``none``,
        or "" to tell it from the chat template.
    reasoning_parser: how it writes reasoning (`frontend.parsing.reasoning`), "" for not at all.
    stream_interval: tokens between two stream events of a request.
    enable_metrics: serve /metrics.
    enable_cache_report: report cached tokens in OpenAI usage.
    log_requests: log one line per finished request (never its text).
    drain_timeout_s: how long SIGTERM lets running requests finish.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    served_model_name: str = ""
    api_key_hashes: tuple[str, ...] = ()
    admin_key_hashes: tuple[str, ...] = ()
    chat_template: str = ""
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    stream_interval: int = 1
    enable_metrics: bool = False
    enable_cache_report: bool = False
    log_requests: bool = False
    drain_timeout_s: float = 30.0

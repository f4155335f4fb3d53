"""What can be known to be wrong before anything heavy starts."""

from __future__ import annotations

import ipaddress
import logging
import socket
from pathlib import Path

from sps_runtime.config.hub import resolve_model_path
from sps_runtime.config.model import ModelConfig, check_degrees, load_model_config
from sps_runtime.config.options import EMBEDDED, EngineOptions
from sps_runtime.config.server import ServerConfig
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
BACKLOG = 2048


def check_model(options: EngineOptions) -> tuple[Path, ModelConfig]:
    """Find the model, read its configuration and check that it can be run as asked.

    Raises:
        ConfigError: one line that says what to change.
    """
    embedded = options.model_path == EMBEDDED
    directory = embedded_model() if embedded else resolve_model_path(options.model_path)
    model = load_model_config(directory)
    check_degrees(model, options.parallel)
    if options.load_format != "dummy" and options.device != "echo":
        _check_weights(directory)
    if options.context_length and options.context_length > model.context_length:
        logger.warning(
            "context length %d is beyond the model's %d: answers may be poor",
            options.context_length,
            model.context_length,
        )
    return directory, model


def embedded_model() -> Path:
    """The directory of the model inside this package."""
    for config in sorted(ASSETS.glob("**/config.json")):
        return config.parent
    raise ConfigError("this installation has no embedded model; give --model-path")


def _check_weights(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    others = [
        path.name for kind in ("bin", "pt", "pth", "gguf") for path in directory.glob(f"*.{kind}")
    ]
    if others:
        raise ConfigError(f"{directory} has weights as {others[0]}; only safetensors are read")
    raise ConfigError(
        f"{directory} has no *.safetensors (--load-format dummy makes random weights)"
    )


def bind_http(server: ServerConfig, *, allow_unauthenticated: bool = False) -> socket.socket:
    """Bind and listen. The socket is held from here to the end, so no other process gets the port.

    Raises:
        ConfigError: when the address is taken or not ours, or would let anyone in.
    """
    host, port = server.host, server.port
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} does not exist")
    if not (server.api_key_hashes or allow_unauthenticated or _is_loopback(host)):
        raise ConfigError(
            f"--host {host} lets other machines in: give --api-key, or --allow-unauthenticated"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    return listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

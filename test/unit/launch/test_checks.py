"""What is refused before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from test.kit.echo_engine import CONFIG

from sps_runtime.config.options import EngineOptions
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.launch.checks import bind_http, check_model
from sps_runtime.types.errors import ConfigError

LLAMA = {**CONFIG, "max_position_embeddings": 4096}


def write_model(directory: Path, **changes: object) -> str:
    (directory / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return str(directory)


def test_models(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        check_model(EngineOptions(model_path=path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="only safetensors"):
        check_model(EngineOptions(model_path=path))
    assert check_model(EngineOptions(model_path=path, load_format="dummy"))[0] == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="tp_size 3"):
        check_model(EngineOptions(model_path=path, parallel=ParallelConfig(tp_size=3)))
    write_model(tmp_path, architectures=["GPT5ForCausalLM"])
    with pytest.raises(ConfigError, match="GPT5ForCausalLM"):
        check_model(EngineOptions(model_path=path))
    with pytest.raises(ConfigError, match="does not exist"):
        check_model(EngineOptions(model_path="/no/such/model"))


def test_a_taken_port_is_one_line() -> None:
    with bind_http(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            bind_http(ServerConfig(port=port))
    with bind_http(ServerConfig(port=port)) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize("port", [-1, 70000])
def test_ports_that_do_not_exist(port: int) -> None:
    with pytest.raises(ConfigError):
        bind_http(ServerConfig(port=port))


def test_other_hosts_are_let_in_only_with_a_key_or_on_purpose() -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        bind_http(ServerConfig(host="0.0.0.0", port=0))
    bind_http(ServerConfig(host="0.0.0.0", port=0, api_key_hashes=("x",))).close()
    bind_http(ServerConfig(host="0.0.0.0", port=0), allow_unauthenticated=True).close()


def test_the_socket_is_not_inherited_by_accident() -> None:
    with bind_http(ServerConfig(port=0)) as listener:
        assert isinstance(listener, socket.socket)
        assert not listener.get_inheritable()

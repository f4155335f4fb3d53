"""The command line: SGLang's names, ours, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sps_runtime.config.attention import AttentionConfig
from sps_runtime.config.environment import hash_keys
from sps_runtime.config.flags import make_parser, parse
from sps_runtime.config.options import make_options
from sps_runtime.config.unsupported import IGNORED, REFUSED
from sps_runtime.types.errors import ConfigError


def test_defaults_are_the_embedded_model_on_loopback() -> None:
    command = parse([])
    assert command.engine.model_path == "embedded"
    assert (command.server.host, command.server.port) == ("127.0.0.1", 30000)
    assert command.engine.parallel.world_size == 1


@pytest.mark.parametrize("flag", ["--sp-size", "--context-parallel-size"])
@pytest.mark.parametrize("tp_flag", ["--tp", "--tp-size", "--tensor-parallel-size"])
def test_degrees_have_their_aliases(flag: str, tp_flag: str) -> None:
    parallel = parse([flag, "3", tp_flag, "2", "--sp-strategy", "pass-q"]).engine.parallel
    assert (parallel.sp_size, parallel.tp_size, parallel.strategy) == (3, 2, "pass_q")


def test_a_realistic_sglang_command_works() -> None:
    line = (
        "--model m --trust-remote-code --dp-size 1 --mem-fraction-static 0.7 --tp 2 --dtype float "
        "--chunked-prefill-size -1 --disable-cuda-graph --cuda-graph-bs 1 2 4 --enable-metrics "
        "--quantization=none --schedule-policy lpm --disable-radix-cache"
    )
    command = parse(line.split())
    assert command.ignored == ("--trust-remote-code", "--cuda-graph-bs")
    assert command.engine.dtype == "float32"
    assert command.engine.scheduler.chunked_prefill_size == -1
    assert not command.engine.enable_prefix_cache and command.server.enable_metrics


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_something_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name}.* is not supported: "):
        parse([f"--{name}=surely-not-neutral"])
    for value in REFUSED[name].neutral:
        assert parse([f"--{name}={value}"]).ignored == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "unknown argument --no-such-flag"),
        (["stray"], "unexpected argument 'stray'"),
        (["--trust-remote-code", "stray"], "unexpected argument 'stray'"),
        (["--port", "x"], "--port"),
        (["--sp-size", "0"], "sp_size must be at least 1"),
        (["--dtype", "float16"], "--dtype"),
        (["--mem-fraction-static", "1.5"], "mem_fraction_static"),
        (["--mem-fraction-static", "nan"], "mem_fraction_static"),
        (["--page-size", "0"], "page_size"),
        (["--watchdog-timeout", "nan"], "watchdog_timeout"),
        (["--nnodes", "2", "--sp-size", "2"], "dist_init_addr"),
        (["--stream-interval", "0"], "stream-interval"),
        (["--config", "/nonexistent.yaml"], "nonexistent"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


def test_no_flag_is_in_two_tables() -> None:
    ours = {name.removeprefix("--") for name in make_parser("x")._option_string_actions}
    assert not set(REFUSED) & set(IGNORED)
    assert not ours & (set(REFUSED) | set(IGNORED))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("c.yaml", "tp-size: 2\nenable_metrics: true\nlog-requests: false\nport: 1234\n"),
        ("c.toml", "tp-size = 2\nenable_metrics = true\nport = 1234\n"),
        ("c.json", '{"tp-size": 2, "enable-metrics": true, "port": 1234}'),
    ],
)
def test_config_files_stand_in_front_of_the_command_line(
    tmp_path: Path, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    command = parse(["--config", str(tmp_path / file), "--port", "99"])
    assert command.engine.parallel.tp_size == 2
    assert command.server.enable_metrics and not command.server.log_requests
    assert command.server.port == 99


def test_yaml_never_makes_objects(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: !!python/object/apply:os.getpid []\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse(["--config", str(file)])


def test_keys_come_from_three_places_and_leave_as_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPS_API_KEY", "from-env")
    file = tmp_path / "keys"
    file.write_text("# comment\nfrom-file\n\n")
    server = parse(["--api-key", "from-argv", "--api-key-file", str(file)]).server
    assert server.api_key_hashes == hash_keys(["from-env", "from-argv", "from-file"])
    assert "from-" not in repr(server)


def test_attention_defaults_and_flags() -> None:
    assert parse([]).engine.attention == AttentionConfig()
    assert parse([]).engine.scheduler.csa_min_tokens is None
    line = (
        "--attention-mode csa --csa-estimator quest --csa-budget 0.2 --csa-tau 0.1 "
        "--csa-max-tau 0.5 --csa-decode sparse --csa-min-tokens 4096"
    )
    engine = parse(line.split()).engine
    assert engine.attention == AttentionConfig("csa", "quest", 0.2, 0.1, 0.5, "sparse")
    assert engine.scheduler.csa_min_tokens == 4096
    told = {"attention_mode": "csa", "csa_budget": 0.2, "csa_min_tokens": 5}
    options = make_options(told)
    assert options.attention == AttentionConfig("csa", budget=0.2)
    assert options.scheduler.csa_min_tokens == 5


@pytest.mark.parametrize(
    "arguments",
    [["--csa-budget", "0"], ["--csa-tau", "nan"], ["--csa-estimator", "x"], ["--csa-decode", "x"]],
)
def test_attention_defaults_that_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=arguments[0].strip("-").replace("-", ".")):
        parse(arguments)

"""Where ranks run, and what fits there; what `sps doctor` says of GPUs. No GPU is needed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test.unit.launch.test_sizing import MODEL

from sps_runtime.config.options import EngineOptions
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.launch import devices, doctor, sizing
from sps_runtime.launch.devices import Gpu, Probe, choose_device, probe_gpus
from sps_runtime.types.errors import ConfigError

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 79 << 30, 80 << 30, (9, 0))
OLD = Gpu(1, "Tesla T4", 14 << 30, 15 << 30, (7, 5))


def found(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, why: str = "") -> None:
    probe = Probe(gpus, why)
    monkeypatch.setattr(devices, "probe_gpus", lambda: probe)
    monkeypatch.setattr(doctor, "probe_gpus", lambda: probe)


def test_without_a_driver_torch_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert probe_gpus(tmp_path) == Probe(why="no NVIDIA driver")


def test_what_another_process_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    gpu = {"name": "G", "free": 5, "total": 9, "capability": [8, 6]}
    said = {"gpus": [gpu, gpu], "why": ""}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(said)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert probe_gpus(tmp_path).gpus == tuple(Gpu(i, "G", 5, 9, (8, 6)) for i in (0, 1))

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.CalledProcessError(1, command, "", "Traceback\nRuntimeError: broken")

    monkeypatch.setattr(subprocess, "run", fail)
    assert probe_gpus(tmp_path) == Probe(why="RuntimeError: broken")


def test_the_probe_runs_here(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    probe = probe_gpus(tmp_path)
    assert probe.gpus or probe.why


def test_auto_takes_gpus_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, why="no NVIDIA driver")
    assert choose_device(EngineOptions(), 2).device == "cpu"
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        choose_device(EngineOptions(device="cuda"), 2)
    found(monkeypatch, H100)
    assert choose_device(EngineOptions(device="cpu"), 2).device == "cpu"
    placed = choose_device(EngineOptions(), 2)
    assert (placed.device, placed.gpus) == ("cuda", (0, 0))
    found(monkeypatch, H100, H100, H100)
    assert choose_device(EngineOptions(base_gpu_id=1), 3).gpus == (1, 2, 1)
    with pytest.raises(ConfigError, match="the first to use is 3"):
        choose_device(EngineOptions(device="cuda", base_gpu_id=3), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int8"}, "for CPUs"),
        ({"attention_backend": "sps_kernel"}, "for CPUs"),
        ({"device_links": "nccl"}, "NCCL shares none"),
    ],
)
def test_what_gpus_refuse(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    found(monkeypatch, H100)
    with pytest.raises(ConfigError, match=message):
        choose_device(EngineOptions(device="cuda", **options), 2)  # type: ignore[arg-type]


def settle(**options: object) -> object:
    return sizing.settle(EngineOptions(**options), MODEL, Path("/m"))  # type: ignore[arg-type]


def test_pages_are_what_weights_leave_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, H100)
    config = sizing.settle(EngineOptions(device="cuda"), MODEL, Path("/m"))
    assert (config.device, config.gpus, config.cache.page_size) == ("cuda", (0,), 128)
    weights = 2 * (2 * (64 * 16 * 12 + 3 * 64 * 128) + 2 * 256 * 64)
    assert devices.weight_bytes(MODEL, 1, 2) == weights
    page = 2 * 2 * (2 * 128 * 16 * 2 + 4 * 16 * 2 + 128 * 16 // 4)
    assert devices.page_bytes(MODEL, 1, "bfloat16", 128) == page
    room = int((79 << 30) * 0.85) - weights - devices.RANK_RESERVE
    assert config.cache.pages_per_rank == room // page
    half = sizing.settle(
        EngineOptions(device="cuda", parallel=ParallelConfig(sp_size=2)), MODEL, Path("/m")
    )
    assert half.gpus == (0, 0)
    room = int((79 << 30) * 0.85 / 2) - weights - devices.RANK_RESERVE
    assert half.cache.pages_per_rank == room // page
    fp8 = EngineOptions(device="cuda", kv_cache_dtype="fp8_e4m3", mem_fraction_static=0.5)
    pages = sizing.settle(fp8, MODEL, Path("/m")).cache.pages_per_rank
    room = int((79 << 30) * 0.5) - weights - devices.RANK_RESERVE
    assert pages == room // (2 * 2 * 2 * 128 * 16)  # no summaries
    with pytest.raises(ConfigError, match="leave no room"):
        settle(device="cuda", mem_fraction_static=0.01)


def test_doctor_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, why="torch 2.13.0+cpu is a build without CUDA")
    (gpu,) = doctor._gpus()
    assert gpu.verdict == "note" and "build without CUDA" in gpu.found and "CPUs" in gpu.found


def test_doctor_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, H100, OLD)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    new, old, flashinfer, triton = doctor._gpus()
    assert new.verdict == "ok" and "sm_90" in new.found and "79.0 of 80.0 GiB" in new.found
    assert old.verdict == "note" and "sm_80" in old.cost
    assert flashinfer.verdict == triton.verdict == "missing"
    assert "flashinfer-python" in flashinfer.cost and "[gpu]" in triton.cost
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    *_, flashinfer, triton = doctor._gpus()
    assert flashinfer.verdict == triton.verdict == "ok"

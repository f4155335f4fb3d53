"""The disk cache of packed weights: hits, damage, full disks, writers beside one another."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test.numerics.helpers.tiny_models import make_reference, save

from sps_runtime.config.model import ModelConfig, load_model_config
from sps_runtime.models import weight_cache
from sps_runtime.models.arena import Arena
from sps_runtime.models.loader import LoadSpec, SharedWeights, load_weights
from sps_runtime.models.memory import HEADER_BYTES
from sps_runtime.models.weight_cache import WeightCache
from sps_runtime.ops.dispatch import choose_ops

pytest.importorskip("sps_kernel")
OPS = choose_ops("sps_kernel").operators


class Host:
    """Starts of a server whose ranks share weights and keep them in a directory."""

    def __init__(self, directory: Path) -> None:
        self.model, self.cache = directory / "model", directory / "cache"
        save(make_reference("qwen3"), self.model)
        self.config: ModelConfig = load_model_config(self.model)
        self.spec = LoadSpec(self.model, cache_dir=self.cache, cache_from_bytes=0)
        self.expected = load_weights(self.config, self.spec, ops=OPS).memory

    def start(self, **changes: object) -> tuple[Arena, Arena]:
        """What two ranks get; returns when the writer, if there is one, is done."""
        fd = os.memfd_create("weights")
        spec = replace(self.spec, **changes)  # type: ignore[arg-type]
        try:
            first = load_weights(self.config, spec, SharedWeights(fd, True), OPS)
            for thread in threading.enumerate():
                if thread.name == "weight-cache":
                    thread.join(20)
            return first, load_weights(self.config, spec, SharedWeights(fd, False), OPS)
        finally:
            os.close(fd)

    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.exists() else []

    def file(self) -> Path:
        (path,) = self.files()
        return path


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def was_read(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the start since the last look read a file."""
    said = any("read from" in message for message in caplog.messages)
    caplog.clear()
    return said


def test_the_second_start_reads_what_the_first_packed(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for arena in host.start():
        assert torch.equal(arena.memory, host.expected)
    assert not was_read(caplog)
    file, status = host.file(), host.file().stat()
    assert file.suffix == ".weights"
    assert status.st_size == HEADER_BYTES + len(host.expected)
    assert status.st_mode & 0o077 == 0
    for arena in host.start():
        assert torch.equal(arena.memory, host.expected)
    assert was_read(caplog)
    assert host.file().stat().st_ino == status.st_ino, "it was not written again"


@pytest.mark.parametrize(
    "damage", ["flip", "header", "magic", "checksum", "short", "longer", "empty", "directory"]
)
def test_damaged_files_are_made_anew(
    host: Host, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.start()
    file = host.file()
    content = bytearray(file.read_bytes())
    if damage == "directory":
        file.unlink()
        file.mkdir()
        first, _ = host.start()
        assert torch.equal(first.memory, host.expected)
        assert any("not kept" in message for message in caplog.messages)
        return
    place = {"flip": HEADER_BYTES + 12345, "header": 20, "magic": 0, "checksum": 49}.get(damage)
    if place is not None:
        content[place] ^= 64
    sizes = {"short": -1, "longer": len(content), "empty": 0}
    extra = b"x" if damage == "longer" else b""
    file.write_bytes(bytes(content[: sizes.get(damage, len(content))]) + extra)
    first, second = host.start()
    assert torch.equal(first.memory, host.expected)
    assert torch.equal(second.memory, host.expected)
    assert any("made anew" in message for message in caplog.messages)
    caplog.set_level(logging.INFO)
    caplog.clear()
    host.start()
    assert was_read(caplog)


def test_each_change_has_a_file_of_its_own(host: Host) -> None:
    """dtype, TP degree, seed of random weights, what the checkpoint holds."""
    seen = {arena.layout.digest() for arena in host.start()}
    for count, changes in enumerate(
        (
            {"dtype": "bfloat16"},
            {"tp_size": 2},
            {"load_format": "dummy"},
            {"load_format": "dummy", "seed": 1},
        ),
        2,
    ):
        host.start(**changes)
        assert len(host.files()) == count, changes
    assert len(seen) == 1


def test_another_checkpoint_of_equal_size_and_time_is_another(host: Host) -> None:
    """As of archives that set all times alike."""
    file = host.model / "model.safetensors"
    os.utime(file, ns=(10**18, 10**18))
    host.start()
    tensors = load_file(file)
    tensors["lm_head.weight"][5] += 1.0
    size = file.stat().st_size
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(10**18, 10**18))
    assert file.stat().st_size == size
    expected = load_weights(host.config, host.spec, ops=OPS).memory
    assert not torch.equal(expected, host.expected)
    assert torch.equal(host.start()[0].memory, expected)
    assert len(host.files()) == 2


def test_a_packing_that_changed_is_another(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    packing = OPS.packing()
    assert packing is not None
    monkeypatch.setattr(type(packing), "fingerprint", lambda self, dtype: b"other")
    host.start()
    assert len(host.files()) == 2


def test_a_disk_that_refuses_costs_a_warning(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for arena in host.start():
        assert torch.equal(arena.memory, host.expected)
    assert any("not kept" in message and "No space" in message for message in caplog.messages)
    assert host.files() == [], "nothing half-written stays"


def test_a_place_that_is_no_directory_costs_a_warning(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.cache.write_text("a file")
    assert torch.equal(host.start()[0].memory, host.expected)
    assert any("not kept" in message for message in caplog.messages)


def test_many_servers_at_once_leave_one_whole_file(host: Host) -> None:
    arenas: list[Arena] = []

    def server() -> None:
        fd = os.memfd_create("weights")
        arenas.append(load_weights(host.config, host.spec, SharedWeights(fd, True), OPS))
        os.close(fd)

    servers = [threading.Thread(target=server) for _ in range(6)]
    for thread in servers:
        thread.start()
    for thread in servers:
        thread.join(20)
    first, _ = host.start()
    assert all(torch.equal(arena.memory, host.expected) for arena in (*arenas, first))
    assert host.file().suffix == ".weights"


def test_remains_of_dead_writers_go_and_living_ones_stay(host: Host) -> None:
    host.cache.mkdir()
    dead, living = host.cache / "dead.tmp", host.cache / "living.tmp"
    dead.write_bytes(b"half")
    living.write_bytes(b"half")
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        host.start()
    assert not dead.exists()
    assert living.exists()


def test_small_weights_are_not_kept(host: Host) -> None:
    host.start(cache_from_bytes=len(host.expected) + 1)
    host.start(cache_dir=None)
    assert host.files() == []


def test_a_file_is_looked_up_by_its_whole_key(tmp_path: Path) -> None:
    """Names are cut short; what stands inside decides."""
    cache = WeightCache(tmp_path, lambda memory: int(memory.sum()))
    memory, fd = torch.arange(100, dtype=torch.uint8), os.memfd_create("weights")
    os.pwrite(fd, bytes(HEADER_BYTES) + bytes(range(100)), 0)
    key = bytes(range(32))
    cache.keep(key, memory, fd)
    read = torch.zeros_like(memory)
    assert cache.load(key, read)
    assert torch.equal(read, memory)
    assert not cache.load(key[:31] + b"x", read)
    assert not cache.load(key, torch.zeros(101, dtype=torch.uint8))
    assert not cache.load(bytes(32), read)
    os.close(fd)


def test_the_writer_yields_to_requests(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs beside the engine, at lower priority, and loading does not wait for it."""
    seen: list[int] = []
    begin = threading.Event()

    def keep(self: WeightCache, key: bytes, memory: torch.Tensor, fd: int) -> None:
        begin.wait(10)
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr(weight_cache.WeightCache, "keep", keep)
    fd, before = os.memfd_create("weights"), os.getpriority(os.PRIO_PROCESS, 0)
    load_weights(host.config, host.spec, SharedWeights(fd, True), OPS)
    os.close(fd)
    assert not seen
    begin.set()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [max(before, weight_cache.BACKGROUND)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_files_unused_for_longest_make_room(tmp_path: Path) -> None:
    def keep(key: bytes, limit: int) -> list[str]:
        with tempfile.TemporaryFile() as file:
            memory = torch.full((5000,), key[0], dtype=torch.uint8)
            file.write(bytes(HEADER_BYTES) + memory.numpy().tobytes())
            file.flush()
            cache = WeightCache(tmp_path, lambda memory: int(memory.sum()), limit)
            cache.keep(key, memory, file.fileno())
        return sorted(path.name[0] for path in tmp_path.iterdir())

    def used(key: bytes, when: int) -> None:
        os.utime(WeightCache(tmp_path, lambda memory: 0).path(key), ns=(when, when))

    one = HEADER_BYTES + 5000
    keys = [bytes([0x10 * i]) * 32 for i in range(1, 6)]
    for age, key in enumerate(keys[:3]):
        assert len(keep(key, 3 * one)) == age + 1
        used(key, age)
    assert keep(keys[0], 3 * one) == ["1", "2", "3"]  # in its own place, and now the youngest
    assert keep(keys[3], 3 * one) == ["1", "3", "4"]
    used(keys[0], 1)
    assert keep(keys[4], 2 * one) == ["4", "5"]
    assert keep(keys[1], one - 1) == ["4", "5"], "too large to be kept at all"

"""Where weights come from: a checkpoint's safetensors files, or a seed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sps_runtime.types.errors import ConfigError

MAPPED_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"


class TensorSource(Protocol):
    """Gives a checkpoint's tensors by name."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, which must be of `shape`, in a floating dtype.

        Raises:
            ConfigError: when it is missing, or of another shape.
        """
        ...

    def identity(self) -> str:
        """What differs when the tensors do, without reading them all."""
        ...


class SafetensorsCheckpoint:
    """The safetensors files of a Hugging Face directory, single or sharded with an index.

    Files are mapped, not read: a tensor's bytes come in when it is copied. They would count as this
    process's memory as long as their file is mapped, so maps are closed every `MAPPED_BYTES`.

    Args:
        device: where tensors are read to.

    Raises:
        ConfigError: when there are no such files, or one is broken.
    """

    def __init__(self, directory: Path, device: torch.device | None = None) -> None:
        self.directory = directory
        self._device = str(device or "cpu")
        self._open: dict[str, safe_open] = {}
        self._read_bytes = 0
        self._file_of = self._files_of_index() or self._files_of_directory()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise ConfigError(f"{self.directory}: the checkpoint lacks tensor {name}")
        tensor: Tensor = self._file(self._file_of[name]).get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{self.directory}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"config.json implies {shape}"
            )
        if not tensor.is_floating_point():
            raise ConfigError(f"{self.directory}: tensor {name} is {tensor.dtype}: quantized?")
        self._read_bytes += tensor.nbytes
        if self._read_bytes >= MAPPED_BYTES:
            self._open.clear()
            self._read_bytes = 0
        return tensor

    def identity(self) -> str:
        """Each file's name, size, times and a sample of its bytes: times alone are equal in two
        checkpoints unpacked from archives, sizes in a model and its fine-tuned brother."""
        files = sorted(set(self._file_of.values()))
        return repr([(name, *_file_identity(self.directory / name)) for name in files])

    def _files_of_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.is_file():
            return {}
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = set(names.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no index of safetensors files: {error}") from None
        for file in files:
            if Path(str(file)).name != file or not (self.directory / file).is_file():
                raise ConfigError(f"{path} names {file!r}, which is not in the directory")
        return dict(names)

    def _files_of_directory(self) -> dict[str, str]:
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{self.directory} holds no safetensors files (others are not read)")
        return {name: path.name for path in files for name in self._file(path.name).keys()}  # noqa: SIM118

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(str(path), framework="pt", device=self._device)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read as safetensors: {error}") from None
        return self._open[name]


SAMPLES, SAMPLE_BYTES = 64, 4096


def _file_identity(path: Path) -> tuple[int, int, int, str]:
    """Size, times of change in ns, and a digest of pieces of the content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        for index in range(SAMPLES):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, status.st_size * index // SAMPLES))
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest.hexdigest()


class RandomWeights:
    """Weights drawn from a seed (``--load-format dummy``), each by its name alone.

    Matrices, tables and biases are normal with deviation 0.02; norms are near one.

    Args:
        device: where they are drawn: each kind of device draws others.
    """

    def __init__(
        self, seed: int, deviation: float = 0.02, device: torch.device | None = None
    ) -> None:
        self.seed, self.deviation = seed, deviation
        self._device = device or torch.device("cpu")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # The CPU generator heeds only 32 bits of its seed, so both go through one hash.
        generator = torch.Generator(self._device)
        generator.manual_seed(crc32(f"{self.seed}/{name}".encode()))
        values = torch.empty(shape, device=self._device)
        values.normal_(0.0, self.deviation, generator=generator)
        return values.add_(1.0) if "norm" in name else values

    def identity(self) -> str:
        return f"random {self.seed} {self.deviation} torch {torch.__version__}"

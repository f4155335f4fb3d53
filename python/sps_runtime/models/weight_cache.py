"""Packed weights on disk, so that the next start only maps them.

One file a layout and checkpoint, named by its key. A file is written under another name, synced
and renamed, so that one with its own name is whole, whoever else writes beside; its checksum is
compared when it is opened, so that one that decayed is made anew. Nothing in it is code.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sps_runtime.models.layout import Layout
from sps_runtime.models.memory import HEADER_BYTES, map_read_only
from sps_runtime.ops.packing import Packing

logger = logging.getLogger(__name__)

MAGIC = b"spscache"
HEADER = struct.Struct("<8s32sQQ")
"""Magic, key, bytes after the header page, their checksum; the CRC-32 of these four follows."""
CRC = struct.Struct("<I")
CHUNK_BYTES = 16 << 20
BACKGROUND = 10
"""Niceness of the thread that writes: requests come first."""


def cache_key(layout: Layout, packing: Packing, source: str) -> bytes:
    """32 bytes that differ where the packed weights do: in what is packed, how, and from what.

    Args:
        source: `TensorSource.identity`.
    """
    digest = hashlib.sha256(layout.digest() + packing.fingerprint(layout.dtype))
    digest.update(source.encode())
    return digest.digest()


@dataclass(frozen=True)
class Found:
    """A valid file, mapped.

    Attributes:
        header: what a rank that opens it later must find in it.
        memory: uint8, what lies behind the header.
    """

    path: Path
    header: bytes
    memory: Tensor


@dataclass(frozen=True)
class WeightCache:
    """A directory of packed weights.

    Attributes:
        checksum: of uint8 memory.
    """

    directory: Path
    checksum: Callable[[Tensor], int]

    def path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()[:32]}.weights"

    def find(self, key: bytes, nbytes: int) -> Found | None:
        """The weights of `key`, or None: not here, or no longer what was written."""
        path = self.path(key)
        try:
            found = open_cached(path, None)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cached weights are made anew: %s", error)
            return None
        _, kept_key, kept_bytes, checksum = HEADER.unpack(found.header[: HEADER.size])
        if kept_key != key or kept_bytes != nbytes or self.checksum(found.memory) != checksum:
            logger.warning("cached weights are made anew: %s is damaged", path)
            return None
        with suppress(OSError):
            os.utime(path)  # who clears old files away sees that it is in use
        return found

    def keep(self, key: bytes, memory: Tensor, fd: int) -> None:
        """Write the weights of `key`, unless the disk does not let us; then say so.

        Args:
            memory: uint8, the weights.
            fd: a file that holds them after its header page.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clear()
            self._write(key, memory, fd)
        except OSError as error:
            logger.warning("the packed weights are not kept in %s: %s", self.directory, error)

    def _write(self, key: bytes, memory: Tensor, fd: int) -> None:
        out, name = tempfile.mkstemp(".tmp", f"{key.hex()[:32]}.", self.directory)
        try:
            fcntl.flock(out, fcntl.LOCK_EX)  # says that somebody writes: `_clear` lets it be
            os.posix_fallocate(out, 0, HEADER_BYTES + len(memory))
            header = HEADER.pack(MAGIC, key, len(memory), self.checksum(memory))
            os.pwrite(out, header + CRC.pack(zlib.crc32(header)), 0)
            _copy(fd, out, HEADER_BYTES, HEADER_BYTES + len(memory))
            os.fsync(out)
            os.rename(name, self.path(key))
            _sync_directory(self.directory)
            logger.info("packed weights are kept in %s", self.path(key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        finally:
            os.close(out)

    def _clear(self) -> None:
        """Remove what writers that died have left."""
        for path in self.directory.glob("*.tmp"):
            try:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except (BlockingIOError, FileNotFoundError):
                continue


def keep_in_background(cache: WeightCache, key: bytes, memory: Tensor, fd: int) -> None:
    """`WeightCache.keep` in a thread that ends with the process, at low priority.

    Args:
        fd: may be closed afterwards.
    """
    own = os.dup(fd)

    def work() -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND)
        try:
            cache.keep(key, memory, own)
        finally:
            os.close(own)

    threading.Thread(target=work, name="weight-cache", daemon=True).start()


def open_cached(path: Path, header: bytes | None) -> Found:
    """Map a file of the cache; its checksum is the caller's affair.

    Args:
        header: what must stand in it; None takes any.

    Raises:
        OSError: it is not there, is truncated, or is not that file.
    """
    size = HEADER.size + CRC.size
    with path.open("rb") as file:
        raw = os.pread(file.fileno(), size, 0)
        valid = len(raw) == size and CRC.unpack(raw[-CRC.size :])[0] == zlib.crc32(raw[: -CRC.size])
        if not valid or raw[: len(MAGIC)] != MAGIC or header not in (None, raw):
            raise OSError(f"{path} has another header")
        nbytes = HEADER.unpack(raw[: HEADER.size])[2]
        if os.fstat(file.fileno()).st_size != HEADER_BYTES + nbytes:
            raise OSError(f"{path} is truncated")
        return Found(path, raw, map_read_only(file.fileno(), nbytes))


def _copy(source: int, target: int, begin: int, end: int) -> None:
    os.lseek(target, begin, os.SEEK_SET)
    while begin < end:
        sent = os.sendfile(target, source, begin, min(CHUNK_BYTES, end - begin))
        if not sent:
            raise OSError("the weights end early")
        begin += sent


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

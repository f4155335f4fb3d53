"""Packed weights on disk, so that the next start only reads them.

One file a layout and checkpoint, named by its key. A file is written under another name, synced
and renamed, so that one with its own name is whole, whoever else writes beside; its checksum is
compared when it is read, so that one that decayed is made anew. Nothing in it is code. Together the
files take a quarter of their file system at most; which were used least recently go first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from torch import Tensor

from sps_runtime.models.layout import Layout
from sps_runtime.models.memory import HEADER_BYTES
from sps_runtime.ops.packing import Packing

logger = logging.getLogger(__name__)

MAGIC = b"spscache"
HEADER = struct.Struct("<8s32sQQ")
"""Magic, key, bytes after the header page, their checksum; the CRC-32 of these four follows."""
CRC = struct.Struct("<I")
CHUNK_BYTES = 16 << 20
SHARE = 0.25
"""Of the directory's file system, which cached weights may take."""
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
class WeightCache:
    """A directory of packed weights.

    Attributes:
        checksum: of uint8 memory.
        limit_bytes: of all files together; `SHARE` of the file system unless told.
    """

    directory: Path
    checksum: Callable[[Tensor], int]
    limit_bytes: int | None = None

    def path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()[:32]}.weights"

    def load(self, key: bytes, memory: Tensor) -> bool:
        """Fill `memory`, uint8, with the weights of `key`; False when they are not here, or are no
        longer what was written: then what `memory` holds means nothing."""
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                self._read(file, key, memory)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("cached weights are made anew: %s", error)
            return False
        with suppress(OSError):
            os.utime(path)  # `_make_room` removes what was used least recently
        logger.info("weights are read from %s", path)
        return True

    def _read(self, file: FileIO, key: bytes, memory: Tensor) -> None:
        """Raises OSError when the file is not what `_write` wrote."""
        raw = os.pread(file.fileno(), HEADER.size + CRC.size, 0)
        whole = len(raw) == HEADER.size + CRC.size
        if not whole or CRC.unpack(raw[HEADER.size :])[0] != zlib.crc32(raw[: HEADER.size]):
            raise OSError(f"{file.name} has another header")
        magic, kept_key, nbytes, checksum = HEADER.unpack(raw[: HEADER.size])
        if (magic, kept_key, nbytes) != (MAGIC, key, len(memory)):
            raise OSError(f"{file.name} holds other weights")
        if os.fstat(file.fileno()).st_size != HEADER_BYTES + nbytes:
            raise OSError(f"{file.name} is truncated")
        file.seek(HEADER_BYTES)
        _read_into(file, memory)
        if self.checksum(memory) != checksum:
            raise OSError(f"{file.name} is damaged")

    def keep(self, key: bytes, memory: Tensor, fd: int) -> None:
        """Write the weights of `key`, unless the disk does not let us; then say so.

        Args:
            memory: uint8, the weights.
            fd: a file that holds them after its header page.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clear()
            self._make_room(HEADER_BYTES + len(memory), self.path(key))
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

    def _make_room(self, nbytes: int, target: Path) -> None:
        """Remove least recently used files until `nbytes` more fit, `target` being replaced.
        Servers that read them meanwhile go on: the bytes stay until they close the file.

        Raises:
            OSError: they alone are too many.
        """
        limit = self.limit_bytes
        if limit is None:
            limit = int(SHARE * shutil.disk_usage(self.directory).total)
        if nbytes > limit:
            raise OSError(f"{nbytes / 1e9:.1f} GB are more than the limit of {limit / 1e9:.1f} GB")
        kept = []
        for path in set(self.directory.glob("*.weights")) - {target}:
            with suppress(FileNotFoundError):
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        total = nbytes + sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
            logger.info("removed %s, unused for longest", path)

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


def _read_into(file: FileIO, memory: Tensor) -> None:
    target, at = memory.numpy().data, 0
    while at < len(target):
        got = file.readinto(target[at : at + CHUNK_BYTES])
        if not got:
            raise OSError(f"{file.name} ends early")
        at += got


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

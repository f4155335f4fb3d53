"""Sleep on a 32-bit word of shared memory until another process changes it (Linux futex).

Calls go through libc and release the GIL, so threads of one process may use them too.
"""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import numpy.typing as npt

_SYSCALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_WAIT, _WAKE = 0, 1
_EVERYONE = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _libc_syscall() -> ctypes._CFuncPtr:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


_syscall = _libc_syscall()


def wait(word: npt.NDArray[np.uint32], seen: int, timeout_s: float) -> None:
    """Return when `word[0]` is not `seen`, when woken, or after `timeout_s`; may return early."""
    limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    _syscall(
        ctypes.c_long(_SYSCALL or 0), ctypes.c_void_p(word.ctypes.data), ctypes.c_int(_WAIT),
        ctypes.c_uint32(seen), ctypes.byref(limit), None, ctypes.c_int(0),
    )  # fmt: skip


def wake_all(word: npt.NDArray[np.uint32]) -> None:
    """Wake every sleeper of `word`, in all processes that map it."""
    _syscall(
        ctypes.c_long(_SYSCALL or 0), ctypes.c_void_p(word.ctypes.data), ctypes.c_int(_WAKE),
        ctypes.c_int(_EVERYONE), None, None, ctypes.c_int(0),
    )  # fmt: skip

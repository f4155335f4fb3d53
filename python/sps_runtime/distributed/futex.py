"""Sleeping on a word of shared memory until another thread or process changes it.

A futex costs nothing while nobody sleeps, works between processes that map the same memfd, and its
wait compares the word in the kernel under the lock that the wake takes, so a change between "I
looked" and "I sleep" is never lost. Calls go through ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Futex:
    """The futex system call of this machine.

    Raises:
        OSError: on a machine whose call number is not known.
    """

    def __init__(self) -> None:
        machine = platform.machine()
        if os.name != "posix" or machine not in _NUMBERS:
            raise OSError(errno.ENOSYS, f"no futex known for {machine}")
        self._number = ctypes.c_long(_NUMBERS[machine])
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long

    def wait(self, address: int, value: int, timeout_s: float) -> None:
        """Sleep while the 32-bit word at `address` is `value`; wakes early for no reason too."""
        seconds = int(timeout_s)
        limit = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
        self._syscall(
            self._number,
            ctypes.c_void_p(address),
            ctypes.c_int(_WAIT),
            ctypes.c_uint32(value & 0xFFFFFFFF),
            ctypes.byref(limit),
            None,
            ctypes.c_int(0),
        )

    def wake(self, address: int) -> None:
        """Wake every sleeper on the word at `address`."""
        self._syscall(
            self._number,
            ctypes.c_void_p(address),
            ctypes.c_int(_WAKE),
            ctypes.c_int(_ALL),
            None,
            None,
            ctypes.c_int(0),
        )

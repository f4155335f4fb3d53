"""Recorded programs: kernel calls run again by one native call, as CUDA graphs do for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sps_kernel import _core
from sps_kernel.arrays import Array


class Program:
    """Calls of this package, recorded once and run as often as wanted.

    While it records, every kernel called on the same thread runs as always *and* is kept with its
    arguments: the same arrays, at the same addresses. :meth:`run` computes all of it again over
    what the arrays hold then, in the order of recording, without the interpreter and without the
    GIL. Whoever replays writes new inputs into the arrays that were given when recording, and reads
    the outputs there.

    What is computed by anything but this package (torch, NumPy) is not seen and not recorded: see
    that nothing is. Calls whose result is a value (:func:`sps_kernel.sample`, the fences) run but
    cannot be recorded: the recording then ends with an error.

    Example
    -------
    >>> program = Program()
    >>> with program.recording():
    ...     y = small_gemm(x, w)
    >>> x[:] = other
    >>> program.run()  # y now holds other @ w.T
    """

    def __init__(self) -> None:
        self._program = _core.Program()

    def __len__(self) -> int:
        """Calls recorded."""
        return len(self._program)

    @property
    def native(self) -> _core.Program:
        """What other classes of this package run."""
        return self._program

    @property
    def recorded(self) -> bool:
        """Whether it can :meth:`run`."""
        return self._program.recorded

    def add_workspace(self, array: Array) -> None:
        """Keep all of a contiguous array, and no array inside of it by itself.

        Arrays that are named in recorded calls are kept alive one by one. Those that lie in a
        workspace are not, so that whoever hands out its memory can tell when an intermediate
        result was dropped, and give its memory to a later call of the same recording.
        """
        self._program.add_workspace(array)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record this thread's calls; other threads are not affected. When the body raises,
        nothing is kept and the program stays unusable.

        Raises
        ------
        RuntimeError
            At the beginning: the thread records already, or the program was recorded before. At the
            end: a call of this package meanwhile could not be recorded; it ran all the same.
        """
        self._program.begin()
        try:
            yield
            self._program.end()
        except BaseException:
            self._program.discard()
            raise

    @property
    def names(self) -> list[str]:
        """What each recorded call computes, in order: the kernel, of products with their shape."""
        return list(self._program.names)

    def run(self, clock_ns: Array | None = None) -> None:
        """Run the recorded calls. Index arrays are checked again, as in each call by itself.

        Parameters
        ----------
        clock_ns
            int64 ``[len(self) + 1]`` to take the monotonic clock (``time.monotonic_ns``) before the
            first call and after each one, for profiles; nothing is timed without it.

        Raises
        ------
        RuntimeError
            It is not recorded, it is running on another thread, or this thread is recording.
        ValueError
            An index array names something outside of its bounds.
        """
        self._program.run(clock_ns)

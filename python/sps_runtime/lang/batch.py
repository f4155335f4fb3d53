"""Many runs of one program, side by side and in order."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")
_LEAST_THREADS = 96


def run(
    work: Callable[[A], R], items: Sequence[A], num_threads: str | int, progress_bar: bool
) -> Iterator[R]:
    """Results of `work` for each of `items`, in their order, each as soon as it can be had.

    Args:
        num_threads: how many at once; ``auto``: 16 for each core, 96 at least.

    Raises:
        Exception: the first that `work` raises; what has not begun by then does not begin.
    """
    if num_threads == "auto":
        num_threads = max(_LEAST_THREADS, (os.cpu_count() or 1) * 16)
    threads = max(1, min(int(num_threads), len(items)))
    with contextlib.ExitStack() as cleanup:
        tick = cleanup.enter_context(_progress(len(items))) if progress_bar else _no_tick
        pool = ThreadPoolExecutor(threads, thread_name_prefix="program")
        cleanup.callback(pool.shutdown, cancel_futures=True)
        futures: list[Future[R]] = [pool.submit(work, item) for item in items]
        for future in futures:
            future.add_done_callback(lambda _: tick())
        for future in futures:
            yield future.result()


def _no_tick() -> None:
    pass


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A line on stderr that says how many have finished; yields what counts one more."""
    lock = threading.Lock()
    done = 0

    def tick() -> None:
        nonlocal done
        with lock:
            done += 1
            filled = 30 * done // total
            print(f"\r[{'#' * filled:30}] {done}/{total}", end="", file=sys.stderr, flush=True)

    yield tick
    print(file=sys.stderr)

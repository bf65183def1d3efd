"""What is put into a mounted file system, on its way to the device: syncfs(2)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nbdthin.errors import Error, NoSpace
from nbdthin.units import MiB

_BEHIND = 32 * MiB  # written out at once: the more, the longer the pieces in which the device gets it

_libc = ctypes.CDLL(None, use_errno=True)


def sync(directory: int, root: Path) -> None:
    """Have the file system at `root`, which the descriptor `directory` is of, written out.

    Raises NoSpace or Error where something of it did not reach the device since `directory` was opened: also what was
    written before, as while the pool was full. Each is told once, so nobody may call this and not listen.
    """
    if _libc.syncfs(directory):
        number = ctypes.get_errno()
        kind = NoSpace if number == errno.ENOSPC else Error
        raise kind(f"the file system at {root} has lost some of what was written to it: {os.strerror(number)}")


@contextlib.contextmanager
def behind(root: Path) -> Iterator[Callable[[int], None]]:
    """Have what is put into the file system at `root` written out by a thread, while more of it comes.

    Yields what is to be called with the number of bytes that were put there. That, and the end, raise as `sync` does.
    """
    with open_directory(root) as directory, ThreadPoolExecutor(1, "writeback") as threads:
        waiting = 0  # bytes
        last: Future[None] | None = None

        def put(count: int) -> None:
            nonlocal waiting, last
            waiting += count
            if waiting >= _BEHIND and (last is None or last.done()):
                if last is not None:
                    last.result()
                waiting, last = 0, threads.submit(sync, directory, root)

        yield put
        if last is not None:
            last.result()


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)

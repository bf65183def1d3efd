"""A disk of which nothing is cached, for tests that decide when what it is asked for comes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence

import pytest

from nbdthin import connection as connection_module
from nbdthin.pool.data import DataFile


class SlowDisk:
    """Nothing that is asked of it at once is cached; some positions fail, all others come when `free` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: set[int] = set()
        self.free = threading.Event()
        self._preadv = connection_module._preadv
        self._read_into = DataFile.read_into
        monkeypatch.setattr(connection_module, "_preadv", self._try)
        monkeypatch.setattr(DataFile, "read_into", lambda data, *arguments: self._wait(data, *arguments))

    def _try(self, fd: int, buffers: Sequence[memoryview], position: int, flags: int) -> int:
        if not self.free.is_set():
            raise BlockingIOError(errno.EAGAIN, "not cached")
        if position in self.bad:
            raise OSError(errno.EIO, "injected")
        return self._preadv(fd, buffers, position, flags)

    def _wait(self, data: DataFile, view: memoryview, position: int, flags: int = 0) -> None:
        self.free.wait()
        if position in self.bad:
            raise OSError(errno.EIO, "injected")
        self._read_into(data, view, position, flags)

"""Takes an image out of the page cache, and proves that it is out."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from .errors import BenchError
from .process import family
from .servers import Export

_IMAGE = 1 << 20  # bytes from which on an open file is taken for one that holds the image
_LEFT = 0.01  # of it may stay: what another process reads at the moment
_PROCESS_MADVISE = 440  # the number of the system call, which neither Python nor glibc 2.36 has
_PAGEOUT = 21
_AT_ONCE = 64 << 20  # bytes


def drop(export: Export) -> None:
    """All files that the server has open for the image, over whatever connection.

    Raises BenchError where they stay. Pages that are dirty cannot be dropped, so it is flushed before.
    """
    with export.client() as client:
        client.flush()
        files = list(_files(export.pid))
        if not any(path.stat().st_blocks for path in files):
            raise BenchError("the server has no file open that could hold the image")
        forget(*files)


def forget(*paths: Path) -> None:
    """Have nothing of some files in the page cache any more. Raises BenchError where it stays."""
    for path in paths:
        _evict(path)
    cached, size = (sum(figures) for figures in zip(*map(_cached, paths), strict=True))
    if cached > _LEFT * size:
        raise BenchError(f"{cached} of {size} bytes of the image stayed in the page cache")


def _evict(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        cached, size = _cached(path)
        if cached > _LEFT * size:
            _page_out(path.resolve())
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


class _Part(ctypes.Structure):
    """struct iovec, whose base is an address in another process."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _page_out(path: Path) -> None:
    """What a process has mapped and looked at can be dropped by way of that process alone, and by root.

    Where that does not help, it stays: `forget` looks.
    """
    for process in psutil.process_iter():
        try:
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if line.endswith(f" {path}"):
                    start, end = (int(address, 16) for address in line.split()[0].split("-"))
                    _page_out_range(process.pid, start, end)
        except OSError:  # it has ended, or is another user's
            continue


def _page_out_range(pid: int, start: int, end: int) -> None:
    """Of addresses (process_madvise(2))."""
    process = os.pidfd_open(pid)
    try:
        for each in range(start, end, _AT_ONCE):
            part = _Part(each, min(_AT_ONCE, end - each))
            one = ctypes.c_size_t(1)
            ctypes.CDLL(None).syscall(_PROCESS_MADVISE, process, ctypes.byref(part), one, _PAGEOUT, 0)
    finally:
        os.close(process)


def _files(pid: int) -> Iterator[Path]:
    """By their descriptors: an overlay may have no name, and a server that forks opens files in its children."""
    seen = set()
    for process in family(pid):
        for path in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # closed since
                continue
            identity = status.st_dev, status.st_ino
            if stat.S_ISREG(status.st_mode) and status.st_size >= _IMAGE and identity not in seen:
                seen.add(identity)
                yield path


def _cached(path: Path) -> tuple[int, int]:
    """Bytes of a file in the page cache, and all of its bytes on the disk."""
    done = subprocess.run(["fincore", "-n", "-b", "-o", "RES", path], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"fincore: {done.stderr.strip()}")
    return int(done.stdout or 0), path.stat().st_blocks * 512

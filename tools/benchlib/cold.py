"""Takes an image out of the page cache, and proves that it is out."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from .errors import BenchError
from .servers import Export

_IMAGE = 1 << 20  # bytes from which on an open file is taken for one that holds the image
_LEFT = 0.01  # of it may stay: what another process reads at the moment


def drop(export: Export) -> None:
    """All files that the server has open for the image, over whatever connection.

    Raises BenchError where they stay. Pages that are dirty cannot be dropped, so it is flushed before.
    """
    with export.client() as client:
        client.flush()
        files = list(_files(export.pid))
        for path in files:
            forget(path)
        cached, size = (sum(figures) for figures in zip(*map(_cached, files), strict=True)) if files else (0, 0)
    if not size:
        raise BenchError("the server has no file open that could hold the image")
    if cached > _LEFT * size:
        raise BenchError(f"{cached} of {size} bytes of the image stayed in the page cache")


def forget(path: Path) -> None:
    """Ask the page cache to have nothing of a file any more."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _files(pid: int) -> Iterator[Path]:
    """By their descriptors: an overlay may have no name, and a server that forks opens files in its children."""
    server = psutil.Process(pid)
    seen = set()
    for process in (server, *server.children(recursive=True)):
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

"""What the machine says about this process and its disks, by psutil."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import stat
from pathlib import Path

import psutil

from nbdthin.control.rows import DiskFacts, ProcessFacts

_M_ARENA_MAX = -8  # malloc.h


def process_facts() -> ProcessFacts:
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        return ProcessFacts(
            pid=process.pid,
            started=process.create_time(),
            memory=own_memory(process),
            threads=process.num_threads(),
            files=process.num_fds(),
            files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            cpu=times.user + times.system,
        )


def disk_facts(path: Path) -> DiskFacts:
    """The file system that `path` is on, or `path` itself where it is a block device."""
    if stat.S_ISBLK(os.stat(path).st_mode):
        with open(path, "rb") as device:
            total = device.seek(0, os.SEEK_END)
        return DiskFacts(str(path), None, "block device", total, total, 0)
    usage = psutil.disk_usage(str(path))
    mount = path.resolve()
    while not mount.is_mount():
        mount = mount.parent
    found = [part for part in psutil.disk_partitions(all=True) if part.mountpoint == str(mount)]
    return DiskFacts(
        device=found[-1].device if found else "unknown",
        mount=mount,
        type=found[-1].fstype if found else "unknown",
        total=usage.total,
        used=usage.used,
        available=usage.free,
    )


def own_memory(process: psutil.Process) -> int:
    """Bytes that are the process's alone: the data file's pages that it has mapped are the page cache's."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def share_arenas() -> None:
    """Have all threads take memory from two places: glibc gives each its own, and each keeps what it once needed."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)

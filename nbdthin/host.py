"""What the machine says about this process and its disks, by psutil."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
import stat
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import psutil

from nbdthin.control.rows import DiskFacts, ProcessFacts
from nbdthin.units import KiB

_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # malloc.h


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
            compiled=is_compiled(),
        )


def is_compiled(module: str = "nbdthin.connection") -> bool:
    """Whether a module is compiled in this process. Of those that tools/building.py lists all are, or none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)


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


def spare_memory() -> None:
    """Have glibc give back what it does not need.

    All threads take from two arenas, where each would have its own and keep in it what it once needed; large buffers
    are mapped each for itself, where after the first one they would come out of a heap that only grows.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 256 * KiB)

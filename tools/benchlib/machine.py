"""What a figure depends on besides the servers: processor, kernel, file system, versions; and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

import psutil

from .errors import BenchError

# Program -> Debian package. nbdkit brings its file plugin and cow filter with it.
_PACKAGES = {
    "fio": "fio",
    "nbdkit": "nbdkit",
    "qemu-nbd": "qemu-utils",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "nbd-server": "nbd-server",
    "nbdcopy": "libnbd-bin",
    "mke2fs": "e2fsprogs",
    "debootstrap": "debootstrap",
    "perf": "linux-perf",
}
_VERSION = re.compile(r"\d+\.\d+(\.\d+)*")


def require(programs: Collection[str]) -> None:
    """Raises BenchError, which says what to install."""
    missing = sorted({_PACKAGES[program] for program in programs if shutil.which(program) is None})
    if missing:
        raise BenchError(f"programs are missing: apt-get install {' '.join(missing)}")
    if "fio" in programs and _lacks_nbd_engine():
        raise BenchError("this fio has no nbd engine; Debian's has: apt-get install fio")


def _lacks_nbd_engine() -> bool:
    """Debian's fio has the engine; one built without libnbd has not."""
    return "nbd" not in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True).stdout.split()


def describe(programs: Iterable[str], directory: Path) -> dict[str, str]:
    """Facts in the order in which a heading tells them."""
    memory = psutil.virtual_memory().total / (1 << 30)
    facts = {
        "processor": f"{os.cpu_count()} x {_processor()}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "file system": _file_system(directory),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        "nbdthin": _distribution("nbdthin"),
        "uvloop": _distribution("uvloop"),
    }
    return facts | {program: _version(program) for program in dict.fromkeys(programs)}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    """The type of the deepest mount that holds `directory`."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    path = directory.resolve()
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "unknown")


def _distribution(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from the checkout"


def _version(program: str) -> str:
    option = "-V" if program == "nbd-server" else "--version"
    said = subprocess.run([program, option], capture_output=True, text=True)
    found = _VERSION.search(said.stdout + said.stderr)
    return found.group() if found else "unknown"

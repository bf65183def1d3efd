"""What this machine has and lacks for devices, fact by fact, and what to do about it. Changes nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdthin.devices import kernel, loop
from nbdthin.devices.state import Way
from nbdthin.units import KiB, format_size

RULE = Path("/etc/udev/rules.d/97-nbdthin.rules")
RULES = (RULE.parent, Path("/run/udev/rules.d"), Path("/usr/lib/udev/rules.d"), Path("/lib/udev/rules.d"))
LOOP_CONFIGURE = (5, 8)  # the oldest kernel that makes a loop device in one call


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    good: bool
    found: str
    advice: str = ""  # what to do where it is not good


@dataclass(frozen=True, slots=True)
class Diagnosis:
    way: Way | None  # how devices will be attached; None: not at all
    facts: tuple[Fact, ...]


def diagnose(data: Path | None) -> Diagnosis:
    """`data` is the pool's data file, of a daemon that runs."""
    rights, system = _rights(), _system()
    by_kernel = (*_driver(), _netlink())
    by_loop = (_fuse(), _nbdfuse(), _loop())
    others = (*_udev(), _memlock(), *_data(data))
    can = rights.good and system.good
    way: Way | None = None
    if can and all(fact.good for fact in by_kernel):
        way = "nbd"
    elif can and all(fact.good for fact in by_loop):
        way = "loop"
    return Diagnosis(way, (rights, system, *by_kernel, *by_loop, *others))


def _rights() -> Fact:
    if os.geteuid() == 0:
        return Fact("rights", True, "root")
    return Fact("rights", False, f"user {os.geteuid()}, who cannot attach or mount", "be root (sudo)")


def _system() -> Fact:
    release = os.uname().release
    if kernel.release() < LOOP_CONFIGURE:
        return Fact("kernel", False, f"{release} makes no loop device in one call", "Linux 5.8, 5.14 for its nbd")
    if kernel.release() < kernel.OLDEST:
        return Fact("kernel", True, f"{release}: its nbd driver is not used, it does not show whose a device is")
    if kernel.release() < (6, 12):
        return Fact("kernel", True, f"{release}: its nbd driver writes zeroes as data, and at most 128 KiB at once")
    return Fact("kernel", True, release)


def _driver() -> Iterator[Fact]:
    subject = "nbd module"
    if not kernel.MODULE.exists():
        if _can_load():
            yield Fact(subject, True, "not loaded; attach loads it")
        else:
            yield Fact(subject, False, "this kernel has none", "a kernel with CONFIG_BLK_DEV_NBD (nbdfuse is used)")
        return
    yield Fact(subject, True, "loaded")
    nbds_max = int((kernel.MODULE / "parameters/nbds_max").read_text())
    used = len(list(Path("/sys/block").glob("nbd*/pid")))
    yield Fact("nbds_max", True, f"{nbds_max}, of which {used} are used; attach has more made when all are")


def _can_load() -> bool:
    if not Path("/proc/modules").exists():  # a kernel without modules
        return False
    with contextlib.suppress(OSError):
        return subprocess.run(["modprobe", "-n", "-q", "nbd"], stderr=subprocess.DEVNULL).returncode == 0
    return False


def _netlink() -> Fact:
    subject = "pyroute2"
    if importlib.util.find_spec("pyroute2") is None:
        return Fact(subject, False, "not installed", "pip install 'nbdthin[attach]' (nbdfuse is used)")
    if not kernel.MODULE.exists():
        return Fact(subject, True, "installed")
    if kernel.answers():
        return Fact(subject, True, "installed, and the driver answers")
    where = "the driver answers only in the machine's own network namespace"
    return Fact(subject, False, where, "attach outside of the container (nbdfuse is used)")


def _udev() -> Iterator[Fact]:
    """udev opens every device that somebody has written to, once more, and its reads come in between."""
    if not (kernel.MODULE.exists() and Path("/run/udev/control").exists()):
        return
    for directory in RULES:
        for rule in directory.glob("*.rules"):
            with contextlib.suppress(OSError):
                if any('"nbd' in line and "nowatch" in line for line in rule.read_text().splitlines()):
                    yield Fact("udev", True, f"does not watch nbd devices ({rule})")
                    return
    what = "watches nbd devices: it reads them whenever a writer closes one, and so keeps them open"
    yield Fact("udev", False, what, f"""echo 'KERNEL=="nbd*", OPTIONS+="nowatch"' > {RULE}; udevadm control -R""")


def _fuse() -> Fact:
    device = Path("/dev/fuse")
    if not device.exists():
        return Fact("fuse", False, f"no {device}", "modprobe fuse; for a container: --device /dev/fuse")
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return Fact("fuse", False, f"{device}: {error.strerror}", "for a container: --device /dev/fuse, CAP_SYS_ADMIN")
    return Fact("fuse", True, f"{device}")


def _nbdfuse() -> Fact:
    path = shutil.which("nbdfuse")
    if path is None:
        return Fact("nbdfuse", False, "not installed", "apt-get install libnbd-bin fuse3")
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return Fact("nbdfuse", True, said.removeprefix("nbdfuse ") or path)


def _loop() -> Fact:
    try:
        os.close(os.open(loop.CONTROL, os.O_RDWR))
    except OSError as error:
        return Fact("loop", False, f"{loop.CONTROL}: {error.strerror}", "modprobe loop; for a container: --privileged")
    return Fact("loop", True, f"{loop.CONTROL}")


def _memlock() -> Fact:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
    return Fact("memlock", True, f"{text}; nbdthin locks no memory, so put no swap on its devices")


def _data(data: Path | None) -> Iterator[Fact]:
    """What the pool's file system can, tried with a file of its own that has no name."""
    if data is None:
        yield Fact("pool", True, "no daemon answers here, so its file system was not tried (--socket PATH)")
        return
    if data.is_block_device():
        return
    try:
        with tempfile.TemporaryFile(dir=data.parent) as file:
            yield from _try(file.fileno(), data.parent)
    except OSError as error:
        yield Fact("pool", False, f"{data.parent}: {error.strerror}", "ask as the daemon's user or root")


def _try(file: int, directory: Path) -> Iterator[Fact]:
    from nbdthin.pool.files import Files

    os.pwrite(file, b"x" * 256 * KiB, 0)
    try:
        Files().punch(file, 0, 256 * KiB)
        yield Fact("hole punching", True, f"{directory} gives space back")
    except OSError as error:
        what = f"{directory}: {error.strerror}; removing frees blocks in the pool, but no space below it"
        yield Fact("hole punching", False, what, "keep the pool on ext4, xfs, btrfs or tmpfs")
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
        yield Fact("RWF_NOWAIT", True, f"{directory} reads without waiting")
    except BlockingIOError:
        yield Fact("RWF_NOWAIT", True, f"{directory} reads without waiting")
    except OSError as error:
        what = f"{directory}: {error.strerror}; every read goes through a thread"
        yield Fact("RWF_NOWAIT", False, what, "keep the pool on ext4, xfs, btrfs or tmpfs")

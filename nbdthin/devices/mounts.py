"""Mounting, and what is mounted: this mount namespace's own table."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nbdthin.errors import Error, InUse, Invalid

FileSystem = Literal["ext4", "xfs", "btrfs"]

_MAGIC: tuple[tuple[FileSystem, int, bytes], ...] = (
    ("xfs", 0, b"XFSB"),
    ("ext4", 0x438, b"\x53\xef"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
)
# Options that are flags of mount(2); all others are the file system's own.
_FLAGS = {
    "defaults": 0,
    "rw": 0,
    "ro": 1 << 0,
    "nosuid": 1 << 1,
    "nodev": 1 << 2,
    "noexec": 1 << 3,
    "sync": 1 << 4,
    "dirsync": 1 << 7,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def is_mount(path: Path) -> bool:
    """Asks the table: a mount whose process has died cannot be looked at."""
    return any(where == str(path) for where, _ in _table())


def mounted_at(device: Path) -> list[Path]:
    """Where the device's file system is mounted."""
    number = os.stat(device).st_rdev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    return [Path(where) for where, numbers in _table() if numbers == wanted]


def _table() -> list[tuple[str, str]]:
    """(mount point, device numbers), the oldest mounts first."""
    rows = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [(_unescaped(fields[4]), fields[2]) for fields in map(str.split, rows)]


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount(device: Path, directory: Path, *, read_only: bool, options: Sequence[str]) -> None:
    """Raises Invalid, or Error with what the kernel says.

    By the system call itself: a mount(8) would live on when this process is killed, and mount what was cleaned up.
    xfs gets `nouuid`, because a clone has its parent's UUID. Where nothing can be written, no journal can be replayed:
    what is only there is not seen then (nothing, where it was unmounted cleanly).
    """
    if not directory.is_dir():
        raise Invalid(f"{directory} is no directory to mount on (mkdir {directory})")
    kind = file_system(device)
    chosen = ["ro"] if read_only else []
    if kind == "xfs":
        chosen += ["nouuid", *(["norecovery"] if read_only else [])]
    elif kind == "ext4" and read_only:
        chosen.append("noload")
    chosen += options
    flags = 0
    for option in chosen:
        flags |= _FLAGS.get(option, 0)
    data = ",".join(option for option in chosen if option not in _FLAGS)
    number = errno.ENODEV
    for each in [kind] if kind else _file_systems():
        arguments = (os.fsencode(device), os.fsencode(directory), each.encode(), flags, data.encode())
        if _libc.mount(*arguments) == 0:
            return
        number = ctypes.get_errno()
    if kind is None:
        raise Error(f"cannot mount {device}: it has no file system that this kernel knows (mkfs makes one)")
    more = ": a bad option, or damage? (dmesg says more)" if number == errno.EINVAL else ""
    raise Error(f"cannot mount the {kind} on {device}: {os.strerror(number)}{more}")


def _file_systems() -> list[str]:
    """Those of devices that the kernel knows by now."""
    rows = Path("/proc/filesystems").read_text().splitlines()
    return [row.strip() for row in rows if not row.startswith("nodev")]


def unmount(path: Path, *, lazily: bool = False) -> None:
    """Raises InUse. `lazily`: also where it is in use, for a device that has died."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH if lazily else 0) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise InUse(f"{path} is in use (fuser -vm {path} says by what)")
    if number != errno.EINVAL:  # no mount any more
        raise Error(f"cannot unmount {path}: {os.strerror(number)}")


def file_system(device: Path) -> FileSystem | None:
    """What the superblock on `device` says; None: none of those that are told apart here."""
    with open(device, "rb", buffering=0) as disk:
        for kind, offset, magic in _MAGIC:
            if os.pread(disk.fileno(), len(magic), offset) == magic:
                return kind
    return None

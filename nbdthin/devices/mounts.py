"""Mounting, and what is mounted: this mount namespace's own table."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nbdthin.errors import Error, InUse, Invalid

FileSystem = Literal["ext4", "xfs"]

_libc = ctypes.CDLL(None, use_errno=True)


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
    """Raises Invalid or Error with what `mount` says.

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
    command = ["mount", *(["-t", kind] if kind else []), *(["-o", ",".join(chosen)] if chosen else [])]
    done = subprocess.run([*command, "--", device, directory], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = next(filter(None, done.stderr.splitlines()), f"status {done.returncode}").removeprefix("mount: ")
        raise Error(f"cannot mount: {said.strip()}")


def unmount(path: Path, *, lazily: bool = False) -> None:
    """Raises InUse. `lazily`: also where it is in use, for a device that has died."""
    if _libc.umount2(os.fsencode(path), 2 if lazily else 0) == 0:  # 2: MNT_DETACH
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise InUse(f"{path} is in use (fuser -vm {path} says by what)")
    if number != errno.EINVAL:  # no mount any more
        raise Error(f"cannot unmount {path}: {os.strerror(number)}")


def file_system(device: Path) -> FileSystem | None:
    """What the superblock on `device` says; None: none of those that need options of their own."""
    with open(device, "rb", buffering=0) as disk:
        start = os.pread(disk.fileno(), 4096, 0)
    if start[:4] == b"XFSB":
        return "xfs"
    return "ext4" if start[1080:1082] == b"\x53\xef" else None

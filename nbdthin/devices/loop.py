"""Loop devices, by the ioctls of linux/loop.h.

A device is configured in one call, so that it is never there half made, and always found by its backing file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

from nbdthin.devices.nodes import BLOCK, node, wait_free
from nbdthin.errors import Error

CONTROL = Path("/dev/loop-control")
PATIENCE = 5.0  # seconds for a read

_CLR_FD = 0x4C01
_CONFIGURE = 0x4C0A  # since Linux 5.8
_GET_FREE = 0x4C82
_READ_ONLY = 1 << 0
_DIRECT_IO = 1 << 4
# struct loop_config: fd, block_size; loop_info64: device, inode, rdevice, offset, sizelimit, number, encrypt_type,
# encrypt_key_size, flags, file_name, crypt_name, encrypt_key, init; reserved
_CONFIG = Struct("=II 5Q 4I 64s 64s 32s 16s 64x")


def attach(file: Path, *, read_only: bool) -> Path:
    """A free loop device on `file`. Direct I/O where the file can: its pages are cached once, by the device's user.

    Raises Error.
    """
    fd = os.open(file, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        flags = _DIRECT_IO | (_READ_ONLY if read_only else 0)
        config = _CONFIG.pack(fd, 0, 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(file)[:63], b"", b"", b"")
        with open(CONTROL, "rb", buffering=0) as control:
            while True:
                device = node(f"loop{fcntl.ioctl(control, _GET_FREE)}")
                # With another's device in between: EBUSY, and the next one is asked for.
                with open(device, "rb" if read_only else "r+b", buffering=0) as disk:
                    if _configure(disk.fileno(), config):
                        return device
    except OSError as error:
        raise Error(f"no loop device can be had: {error.strerror} (nbdthin doctor says more)") from error
    finally:
        os.close(fd)


def _configure(disk: int, config: bytes) -> bool:
    try:
        fcntl.ioctl(disk, _CONFIGURE, config)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def find(file: Path) -> Iterator[Path]:
    """The devices on `file`."""
    for backing in BLOCK.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it has just been detached
            if backing.read_text().rstrip("\n") == str(file):
                yield node(backing.parts[3])


def answers(device: Path) -> bool:
    """Can its first sector be read? Where that takes long it is held to be: a server may stop for a while.

    By another process: one that waits for a disk cannot be ended.
    """
    reader = subprocess.Popen(
        ["dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return reader.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        reader.kill()
        return True


def detach(device: Path) -> None:
    """Free `device`, which nobody has mounted. Raises InUse where another process keeps it open."""
    try:
        with open(device, "rb", buffering=0) as disk:
            fcntl.ioctl(disk, _CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # detached already
            raise
    wait_free(device, "loop/backing_file")

"""Loop devices, by the ioctls of linux/loop.h.

A device is configured in one call, so that it is never there half made, and always found by its backing file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

from nbdthin.errors import Error, InUse

CONTROL = Path("/dev/loop-control")
MAJOR = 7
PATIENCE = 10.0  # seconds for others, such as udev, to close a device

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
                device = Path(f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}")
                _make_node(device)
                # With another's device in between: EBUSY, and the next one is asked for.
                with (
                    contextlib.suppress(BlockingIOError),
                    open(device, "rb" if read_only else "r+b", buffering=0) as node,
                ):
                    if _configure(node.fileno(), config):
                        return device
    except OSError as error:
        raise Error(f"no loop device can be had: {error.strerror} (nbdthin doctor says more)") from error
    finally:
        os.close(fd)


def _configure(node: int, config: bytes) -> bool:
    try:
        fcntl.ioctl(node, _CONFIGURE, config)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def _make_node(device: Path) -> None:
    """In a container the kernel's next free device may have no node."""
    if not device.exists():
        with contextlib.suppress(FileExistsError):
            os.mknod(device, stat.S_IFBLK | 0o660, os.makedev(MAJOR, int(device.name.removeprefix("loop"))))


def find(file: Path) -> Iterator[Path]:
    """The devices on `file`."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it has just been detached
            if backing.read_text().rstrip("\n") == str(file):
                yield Path("/dev", backing.parts[3])


def detach(device: Path) -> None:
    """Free `device`, which nobody has mounted. Raises InUse where another process keeps it open."""
    _make_node(device)
    try:
        with open(device, "rb", buffering=0) as node:
            fcntl.ioctl(node, _CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # detached already
            raise
    deadline = time.monotonic() + PATIENCE
    while Path("/sys/block", device.name, "loop/backing_file").exists():  # until the last who has it open closes it
        if time.monotonic() > deadline:
            raise InUse(f"{device} is held open by another process (fuser -v {device} says which); it goes with it")
        time.sleep(0.001)

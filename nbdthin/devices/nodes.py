"""Block devices as files in /dev."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

from nbdthin.errors import InUse

BLOCK = Path("/sys/block")
PATIENCE = 10.0  # seconds for others, such as udev, to close a device


def node(name: str) -> Path:
    """The file of a device, which is made where it is missing: in a container, none may appear for a new device."""
    path = Path("/dev", name)
    if not path.exists():
        major, minor = map(int, (BLOCK / name / "dev").read_text().split(":"))
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(major, minor))
    return path


def wait_free(device: Path, sign: str) -> None:
    """Wait until `sign`, below the device's directory in sysfs, is gone: until the last who has it open closes it.

    Raises InUse.
    """
    deadline = time.monotonic() + PATIENCE
    while (BLOCK / device.name / sign).exists():
        if time.monotonic() > deadline:
            raise InUse(f"{device} is held open by another process (fuser -v {device} says which); it goes with it")
        time.sleep(0.001)

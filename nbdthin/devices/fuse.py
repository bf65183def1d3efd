"""An export as a file: nbdfuse, a process of its own for each.

It outlives the tool that started it and ends when its file is unmounted. When its server goes away it ends too, and
whoever reads the file then gets EIO: unlike the kernel's driver it does not wait for another server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from nbdthin.devices import mounts
from nbdthin.devices.processes import ended, spawn
from nbdthin.devices.state import Attachment
from nbdthin.errors import Error

PATIENCE = 30.0  # seconds for nbdfuse to connect
LAST_PATIENCE = 5.0  # seconds for its end: everything has been flushed by then


def start(attachment: Attachment) -> None:
    """Show the export as `attachment.disk`. Raises Error."""
    program = shutil.which("nbdfuse")
    if program is None:
        raise Error("nbdfuse is missing: apt-get install libnbd-bin (nbdthin doctor says what else is)")
    file, pid_file, log = attachment.disk, attachment.home / "pid", attachment.home / "log"
    file.touch()
    options = ["-r"] if attachment.read_only else []
    if attachment.connections is not None:
        options += ["-C", str(attachment.connections)]
    pid = spawn([program, *options, "-P", str(pid_file), str(file), attachment.uri], log)
    deadline = time.monotonic() + PATIENCE
    while not (pid_file.exists() and pid_file.read_text().strip()):  # it is written when the file can be read
        if ended(pid, 0.001) or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").split("\n")
            raise Error(f"nbdfuse cannot show {attachment.uri}: {next(filter(None, lines), 'no answer')}")


def find(file: Path) -> Iterator[int]:
    """The processes that show, or are about to show, something as `file`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                if os.fsencode(file) in (entry / "cmdline").read_bytes().split(b"\0"):
                    yield int(entry.name)


def stop(file: Path) -> None:
    """Unmount `file`, which no device is on any more, and wait for the end of what showed it."""
    processes = list(find(file))
    unmounted = False
    while mounts.is_mount(file):
        mounts.unmount(file)
        unmounted = True
    for pid in processes:
        if not unmounted:  # it has not come so far, and would mount when nobody knows of it
            _end(pid, file)
        if not ended(pid, LAST_PATIENCE):  # its mount is in another mount namespace too
            _end(pid, file)
            ended(pid, LAST_PATIENCE)
    while mounts.is_mount(file):  # it came so far after all
        mounts.unmount(file)


def _end(pid: int, file: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if pid in find(file):  # still the same process: by its handle it stays so
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)

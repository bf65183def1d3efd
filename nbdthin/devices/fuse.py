"""An export as a file: nbdfuse, a process of its own for each.

It outlives the tool that started it and ends when its file is unmounted. When its server goes away it ends too, and
whoever reads the file then gets EIO: unlike the kernel's driver it does not wait for another server.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from nbdthin.devices import mounts
from nbdthin.errors import Error

PATIENCE = 30.0  # seconds for nbdfuse to connect, and to answer what is left at its end


def start(uri: str, file: Path, log: Path, *, read_only: bool, connections: int | None) -> None:
    """Show the export as `file`, which is made. Raises Error."""
    program = shutil.which("nbdfuse")
    if program is None:
        raise Error("nbdfuse is missing: apt-get install libnbd-bin (nbdthin doctor says what else is)")
    pid_file = file.with_name("pid")
    file.touch()
    options = ["-r"] if read_only else []
    if connections is not None:
        options += ["-C", str(connections)]
    pid = _spawn([program, *options, "-P", str(pid_file), str(file), uri], log)
    deadline = time.monotonic() + PATIENCE
    while not (pid_file.exists() and pid_file.read_text().strip()):  # it is written when the file can be read
        if _wait(pid, 0.001) or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").split("\n")
            raise Error(f"nbdfuse cannot show {uri}: {next(filter(None, lines), 'no answer')}")


def _spawn(command: list[str], log: Path) -> int:
    """A process that is nobody's: neither Ctrl-C at this terminal nor the end of this process ends it."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(command[0], command, os.environ, file_actions=files, setsid=True)


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
        if not _wait(pid, PATIENCE):
            _end(pid, file)
            _wait(pid, PATIENCE)
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


def _wait(pid: int, seconds: float) -> bool:
    """Has it ended, after `seconds` at most? It need not be a child of this process."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(handle, select.POLLIN)
        ended = bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return ended

"""Processes that outlive the one that starts them."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path


def spawn(command: list[str], log: Path) -> int:
    """A process that is nobody's: neither Ctrl-C at this terminal nor the end of this process ends it."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(command[0], command, os.environ, file_actions=files, setsid=True)


def ended(pid: int, seconds: float) -> bool:
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

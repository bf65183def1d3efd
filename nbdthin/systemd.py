"""The two things a service manager and a daemon say to each other: sockets that were opened before the start
(sd_listen_fds), and what state the daemon is in (sd_notify). Without a manager both are nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """The sockets handed over to this process, with the names that the .socket unit gives them; only once."""
    wanted = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not wanted:
        return []
    found = []
    for index in range(int(count)):
        fd = FIRST_FD + index
        os.set_inheritable(fd, False)
        handed = socket.socket(fileno=fd)
        handed.setblocking(False)
        found.append((names[index] if index < len(names) else "", handed))
    return found


def notify(state: str) -> None:
    """Tell the service manager, if there is one, `READY=1` for example. One that is gone does no harm."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.connect("\0" + where[1:] if where.startswith("@") else where)
        channel.sendall(state.encode())

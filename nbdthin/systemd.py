"""The two things a service manager and a daemon say to each other: sockets that were opened before the start
(sd_listen_fds), and what state the daemon is in (sd_notify). Without a manager both are nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket

from nbdthin.errors import Error

FIRST_FD = 3  # SD_LISTEN_FDS_START


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """The sockets handed over to this process, with the names that the .socket units give them; only once.

    Raises Error for what is no listening stream socket: that unit is not meant for this.
    """
    wanted = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not wanted:
        return []
    if not count.isdecimal():
        raise Error(f"LISTEN_FDS is no number: {count!r}")
    return [(names[index] if index < len(names) else "", _inherited(FIRST_FD + index)) for index in range(int(count))]


def _inherited(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        handed = socket.socket(fileno=fd)
        listening = handed.type == socket.SOCK_STREAM and handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise Error(f"descriptor {fd}, which LISTEN_FDS speaks of, is no socket: {error.strerror}") from error
    if not listening:
        raise Error(f"descriptor {fd} is no socket that listens for streams (in its unit: ListenStream=, Accept=no)")
    handed.setblocking(False)
    return handed


def notify(state: str) -> None:
    """Tell the service manager, if there is one, `READY=1` for example. One that is gone does no harm."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.connect("\0" + where[1:] if where.startswith("@") else where)
        channel.sendall(state.encode())

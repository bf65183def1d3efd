"""Parts of the data file that a unix socket was given without a copy: its peer reads the page cache itself, later.

Until it has, such a part must not become anybody else's. What the peer has not read is among the last bytes that were
sent, as many as the socket's buffer holds; and when nothing waits in the socket, it has read all of them. (TCP cannot
be asked: what the other side's kernel has acknowledged may still be these pages, on a loopback.)
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections import deque

from nbdthin.units import KiB

_SLACK = 128 * KiB  # bytes that a socket takes beyond its buffer: a message of 17 pages, and one that is being read
_INT = struct.Struct("i")


class Lent:
    """What one socket was given."""

    def __init__(self, lender: socket.socket) -> None:
        """`lender` is a unix stream socket, whose buffer keeps its size."""
        self._socket = lender
        self._most = lender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) + _SLACK
        self._parts: deque[tuple[int, int, int]] = deque()  # position, length, and what was lent before its end
        self._total = 0
        self.abandoned = False  # its connection is over, and the socket is kept for this alone

    def add(self, position: int, length: int) -> None:
        """This part of the data file was sent."""
        total = self._total = self._total + length
        parts = self._parts
        parts.append((position, length, total))
        while parts[0][2] <= total - self._most:
            parts.popleft()

    def unread(self) -> list[tuple[int, int]]:
        """(position, length) of all that the peer may still have to read."""
        if self._parts and not self._waiting():
            self._parts.clear()
        return [(position, length) for position, length, _ in self._parts]

    def _waiting(self) -> int:
        """Bytes of memory in the socket that its peer has not read (SIOCOUTQ, unix(7))."""
        return int(_INT.unpack(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(_INT.size)))[0])

    def abandon(self) -> None:
        """The connection is over: the peer finds the end behind what it has still to read."""
        self.abandoned = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer was first
            pass

    def close(self) -> None:
        self._socket.close()

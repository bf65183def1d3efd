"""A blocking NBD client: fills images, reads them back, flushes; one request at a time, but for `ask` and `answer`.

It speaks the least there is (EXPORT_NAME, simple replies), which every server has. It is not for measuring, and
it shares nothing with nbdthin, so that a mistake there cannot hide itself here.
"""

from __future__ import annotations

import socket
from pathlib import Path
from struct import Struct
from types import TracebackType

from .errors import BenchError

_GREETING = Struct(">8s8sH")  # "NBDMAGIC", "IHAVEOPT", handshake flags
_OPTION = Struct(">I8sII")  # client flags, "IHAVEOPT", option, length of its data
_EXPORT = Struct(">QH")  # size, transmission flags
_REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REPLY = Struct(">IIQ")  # magic, error, cookie

_FIXED_NEWSTYLE_NO_ZEROES = 3
_EXPORT_NAME = 1
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM = range(5)

Address = Path | tuple[str, int]  # of a unix socket, or host and port


def connect(address: Address, timeout: float) -> socket.socket:
    """Raises OSError where nobody listens."""
    connection = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(address if isinstance(address, tuple) else str(address))
    except OSError:
        connection.close()
        raise
    return connection


class Client:
    """One connection to one export. Errors are BenchError, OSError when the socket breaks."""

    def __init__(self, address: Address, export: str, timeout: float = 60.0) -> None:
        self._socket = connect(address, timeout)
        try:
            self.size = self._negotiate(export.encode())
        except OSError as error:
            self._socket.close()
            raise BenchError(f"export {export!r} at {address}: {error}") from error
        self._cookie = 0

    def _negotiate(self, export: bytes) -> int:
        magic, option_magic, _ = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise BenchError(f"not a newstyle NBD server: {magic!r}")
        head = _OPTION.pack(_FIXED_NEWSTYLE_NO_ZEROES, b"IHAVEOPT", _EXPORT_NAME, len(export))
        self._socket.sendall(head + export)
        size: int = _EXPORT.unpack(self._receive(_EXPORT.size))[0]
        return size

    def _receive(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise BenchError("the server closed the connection")
            view = view[count:]
        return buffer

    def _request(self, kind: int, offset: int, length: int, payload: bytes = b"") -> None:
        self._cookie += 1
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._cookie, offset, length))
        self._socket.sendall(payload)
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if (magic, cookie) != (_REPLY_MAGIC, self._cookie):
            raise BenchError(f"not a reply to request {self._cookie}: magic {magic:#x}, cookie {cookie}")
        if error:
            raise BenchError(f"request {kind} at {offset} of {length} bytes: NBD error {error}")

    def read(self, offset: int, length: int) -> bytearray:
        self._request(_READ, offset, length)
        return self._receive(length)

    def write(self, offset: int, data: bytes) -> None:
        self._request(_WRITE, offset, len(data), data)

    def flush(self) -> None:
        self._request(_FLUSH, 0, 0)

    def trim(self, offset: int, length: int) -> None:
        self._request(_TRIM, offset, length)

    def ask(self, cookie: int, offset: int, length: int) -> None:
        """Ask for a range and do not wait: `answer` does."""
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, cookie, offset, length))

    def answer(self, length: int) -> tuple[int, bytearray]:
        """The next answer to one of several reads of `length` bytes each: its cookie and data."""
        reply = self._receive(_REPLY.size + length)
        magic, error, cookie = _REPLY.unpack_from(reply)
        if magic != _REPLY_MAGIC or error:
            raise BenchError(f"not an answer to a read: magic {magic:#x}, error {error}")
        return cookie, reply[_REPLY.size :]

    def close(self) -> None:
        try:
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        except OSError:
            pass  # the server went first; there is nothing left to say goodbye to
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

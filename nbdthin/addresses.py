"""Where a server listens: addresses as they are written, the sockets bound to them, the URIs clients use.

A unix socket that a dead daemon left behind is replaced; one that answers, and anything that is no socket, is not
touched. Nothing here accepts or speaks.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nbdthin.errors import Error, Invalid

NBD_PORT = 10809  # assigned by IANA
BACKLOG = 128
# For whoever makes a loop's server of a unix socket: from Python 3.13 on the loop would remove the socket's file at the
# end, also of a socket that was handed over and that clients queue at.
KEEP_FILE = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
MAX_UNIX_PATH = 107  # bytes of a path in sockaddr_un, its NUL left out


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def uri(self, name: str) -> str:
        """Where clients find the export `name`, as the NBD project writes URIs."""
        return f"nbd+unix:///{quote(name, safe='/:@')}?socket={quote(str(self.path), safe='/')}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int  # 0: any free one

    def __str__(self) -> str:
        return f"tcp:{_bracketed(self.host)}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def uri(self, name: str) -> str:
        host = "localhost" if self.host in ("0.0.0.0", "::") else self.host
        port = "" if self.port == NBD_PORT else f":{self.port}"
        return f"nbd://{_bracketed(host)}{port}/{quote(name, safe='/:@')}"


Address = UnixAddress | TcpAddress


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_address(text: str, base: Path) -> Address:
    """`unix:PATH` (relative to `base`) or `tcp:HOST:PORT`, an IPv6 host in brackets. Raises Invalid."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest and "\0" not in rest:
        return UnixAddress(base / rest)
    if kind == "tcp":
        match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", rest)
        if match is not None and int(match[3]) < 1 << 16:
            return TcpAddress(match[1] or match[2], int(match[3]))
    raise Invalid(f"not an address: {text!r} (write unix:PATH, tcp:127.0.0.1:{NBD_PORT} or tcp:[::1]:{NBD_PORT})")


def address_of(listening: socket.socket) -> Address:
    """Where a bound socket is found: with the port it was given, and an absolute path."""
    if listening.family == socket.AF_UNIX:
        return UnixAddress(Path(os.fsdecode(listening.getsockname())).absolute())
    host, port = listening.getsockname()[:2]
    return TcpAddress(host, port)


def bind(address: Address, *, private: bool = False) -> list[socket.socket]:
    """Listen at `address`: one socket, or one for each address that a host name stands for.

    A `private` unix socket is its owner's alone (0600); otherwise the umask decides. Raises Error, one line.
    """
    if isinstance(address, UnixAddress):
        return [_bind_unix(address, private)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise Error(f"cannot listen at {address}: {error.strerror}") from error
    with contextlib.ExitStack() as undo:
        sockets = []
        for family, _, _, _, where in dict.fromkeys(found):
            listening = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # 0.0.0.0 and [::] may be listed side by side
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _listen(listening, address, where)
            sockets.append(listening)
        undo.pop_all()
    return sockets


def _bind_unix(address: UnixAddress, private: bool) -> socket.socket:
    path = os.fsencode(address.path)
    if len(path) > MAX_UNIX_PATH:
        raise Invalid(f"{address} is too long for a socket: {len(path)} bytes (up to {MAX_UNIX_PATH})")
    _remove_stale(address)
    with contextlib.ExitStack() as undo:
        listening = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # By the umask, so that there is no moment in which others could connect.
        before = os.umask(0o177) if private else None
        try:
            _listen(listening, address, path)
        finally:
            if before is not None:
                os.umask(before)
        undo.pop_all()
    return listening


def _listen(listening: socket.socket, address: Address, where: object) -> None:
    try:
        listening.bind(where)  # type: ignore[arg-type]  # a path, or what getaddrinfo said
        listening.listen(BACKLOG)
    except OSError as error:
        raise _refusal(address, error) from error
    listening.setblocking(False)


def _refusal(address: Address, error: OSError) -> Error:
    match error.errno:
        case errno.EADDRINUSE:
            return Error(f"{address} is in use: another process listens there (is this daemon running already?)")
        case errno.ENOENT if isinstance(address, UnixAddress):
            return Error(f"cannot listen at {address}: there is no directory {address.path.parent}")
        case _:
            return Error(f"cannot listen at {address}: {os.strerror(error.errno or errno.EIO)}")


def _remove_stale(address: UnixAddress) -> None:
    """Remove the socket of a process that is gone."""
    try:
        mode = os.lstat(address.path).st_mode
    except OSError:
        return  # there is nothing, or `bind` will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise Error(f"cannot listen at {address}: something that is no socket is there (remove it, or choose another)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(address.path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                address.path.unlink()
        except OSError:
            pass  # alive but busy, or not ours to ask: `bind` refuses


def unlink(address: Address) -> None:
    """Remove the file of a unix socket that this process listened at."""
    if isinstance(address, UnixAddress):
        with contextlib.suppress(OSError):
            address.path.unlink()

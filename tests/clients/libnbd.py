"""libnbd's own Python binding, so that a test can send what no well-behaved tool would.

Debian installs the binding for its own python3, outside the virtual environment; it is imported from there, alone.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Protocol

from nbdthin.units import GiB
from tests.conftest import missing

DEBIAN = "/usr/lib/python3/dist-packages"
MOST = 2 * GiB  # of one BLOCK_STATUS: its length is a u32


class Number(Protocol):
    """An error number that a callback is given."""

    value: int


class Handle(Protocol):
    """What the tests use of nbd.NBD. Methods raise nbd.Error, whose `errnum` is the server's error."""

    def add_meta_context(self, name: str) -> None: ...
    def set_export_name(self, name: str) -> None: ...
    def set_handshake_flags(self, flags: int) -> None: ...
    def set_opt_mode(self, enable: bool) -> None: ...
    def set_request_structured_replies(self, request: bool) -> None: ...
    def set_strict_mode(self, flags: int) -> None: ...
    def connect_uri(self, uri: str) -> None: ...
    def connect_unix(self, path: str) -> None: ...
    def opt_abort(self) -> None: ...
    def opt_go(self) -> None: ...
    def opt_list(self, each: Callable[[str, str], None]) -> int: ...
    def opt_list_meta_context(self, each: Callable[[str], None]) -> int: ...
    def get_size(self) -> int: ...
    def is_read_only(self) -> bool: ...
    def can_multi_conn(self) -> bool: ...
    def get_structured_replies_negotiated(self) -> bool: ...
    def pread(self, count: int, offset: int, flags: int = 0) -> bytearray: ...
    def pread_structured(
        self, count: int, offset: int, chunk: Callable[[bytes, int, int, object], None], flags: int = 0
    ) -> bytearray: ...
    def pwrite(self, data: bytes, offset: int, flags: int = 0) -> None: ...
    def trim(self, count: int, offset: int, flags: int = 0) -> None: ...
    def zero(self, count: int, offset: int, flags: int = 0) -> None: ...
    def cache(self, count: int, offset: int, flags: int = 0) -> None: ...
    def flush(self, flags: int = 0) -> None: ...
    def block_status(
        self, count: int, offset: int, extent: Callable[[str, int, list[int], object], None], flags: int = 0
    ) -> None: ...
    def aio_pread(self, buffer: object, offset: int) -> int: ...
    def aio_pwrite(self, buffer: object, offset: int, completion: Callable[[Number], int]) -> int: ...
    def aio_in_flight(self) -> int: ...
    def aio_is_ready(self) -> bool: ...
    def aio_is_dead(self) -> bool: ...
    def aio_is_closed(self) -> bool: ...
    def poll(self, timeout: int) -> int: ...
    def shutdown(self) -> None: ...


def load() -> ModuleType:
    """The module `nbd`."""
    sys.path.append(DEBIAN)
    try:
        return importlib.import_module("nbd")
    except ImportError as error:
        missing(f"python3-libnbd is not here for Python {sys.version_info[0]}.{sys.version_info[1]}: {error}")
    finally:
        sys.path.remove(DEBIAN)


def new() -> Handle:
    """Not connected. It sends whatever it is told to."""
    nbd = load()
    handle: Handle = nbd.NBD()
    handle.set_strict_mode(0)
    return handle


@contextlib.contextmanager
def connected(uri: str, *contexts: str) -> Iterator[Handle]:
    """A connection with these meta contexts. It ends politely unless it is dead already."""
    handle = new()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        if handle.aio_is_ready():
            handle.shutdown()


def extents(handle: Handle, context: str, count: int, offset: int = 0, flags: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of what BLOCK_STATUS says about a range, equal neighbours joined, cut to the range."""
    found: list[tuple[int, int]] = []
    end = offset + count

    def collect(name: str, start: int, entries: list[int], error: object) -> None:
        position = start
        for length, status in zip(entries[::2], entries[1::2], strict=True):
            length = min(length, end - position)
            position += length
            if name != context:
                continue
            if found and found[-1][1] == status:
                found[-1] = (found[-1][0] + length, status)
            else:
                found.append((length, status))

    while sum(length for length, _ in found) < count:
        known = sum(length for length, _ in found)
        handle.block_status(min(count - known, MOST), offset + known, collect, flags)
        assert sum(length for length, _ in found) > known, "an answer without an extent"
    return found

"""What was answered and is not durable yet, kept where it outlives the process: so that a killed daemon loses nothing.

A client that comes back to a daemon that was killed does not send again what had been answered: NBD has no way to tell
it that a cache was lost, and the FLUSH that it sends next is answered by a daemon that never saw those writes. Their
bytes are in the page cache, which is the kernel's; what is missing is the mapping. So each change of the mapping is
noted in a file in memory (/dev/shm) before the replies of its turn of the loop leave, and what the journal lacks of the
notes is its first commit when the pool is opened next. Rules:

- the notes say nothing about power cuts: they are gone then, and so they must be, as the bytes are;
- a note is appended whole, under the number of the journal's frame that will hold the same; a batch has a file, and one
  is in the making while one is being made durable, so there are two, in turn;
- they are for the process that opens the pool next, and for no other: whoever opens a pool gives it a new session;
- notes that cannot be written end the notes, not the work; a sync that failed ends them too, as it may have lost bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nbdthin.pool.records import Entries, Record, decode, encode

DIRECTORY = Path("/dev/shm")
SESSION_BYTES = 16
_MAGIC = b"NBTRcnt1"
_HEADER_BYTES = len(_MAGIC) + SESSION_BYTES
_NOTE = struct.Struct("<IIQ")  # length behind this, its crc, number of the journal's frame
_PART = struct.Struct("<II")  # kind, length
_PUTS, _RECORD = 0, 1
_ROW = 3  # words of a put: layer, block, entry

log = logging.getLogger("nbdthin.pool")


class Recent:
    """The notes of one pool. `recover` what is left of the last session, then `start`; `stop` when all is durable."""

    def __init__(self, uuid: str, directory: Path = DIRECTORY) -> None:
        self.puts = array("Q")  # rows of entries that changed since the last note; `Pool.put` adds to it
        self._parts: list[bytes] = []  # what came before them
        self._paths = [directory / f"nbdthin-{uuid}.{index}" for index in range(2)]
        self._fds: list[int] = []  # of the two files; the first is being written
        self._position = 0
        self._number = 0  # of the journal's frame that will hold what is noted now

    @property
    def path(self) -> Path:
        """One of its files."""
        return self._paths[0]

    # -- the last session

    def recover(self, session: bytes, sequence: int) -> list[Record]:
        """What `session` noted behind the journal's frame `sequence`, in its order. Raises BadRecord."""
        notes: dict[int, list[bytes]] = {}
        for path in self._paths:
            for number, body in self._read(path, session):
                if number > sequence:
                    notes.setdefault(number, []).append(body)
        if sequence + 1 not in notes:  # whatever is there builds on a frame that the journal has not
            return []
        return list(_records(body for number in sorted(notes) for body in notes[number]))

    def _read(self, path: Path, session: bytes) -> Iterator[tuple[int, bytes]]:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with open(fd, "rb") as file:
                data = file.read() if _is_ours(fd) else b""
            position = _HEADER_BYTES
            if data[:position] != _MAGIC + session:
                return
            while len(data) - position >= _NOTE.size:
                length, crc, number = _NOTE.unpack_from(data, position)
                body = data[position + _NOTE.size : position + _NOTE.size + length]
                if len(body) != length or zlib.crc32(body) != crc:
                    return  # it was killed while it wrote this, and answered nobody
                yield number, body
                position += _NOTE.size + length

    # -- this session

    def start(self, session: bytes, sequence: int) -> None:
        """Begin: `sequence` is that of the journal's last frame."""
        self._number = sequence + 1
        try:
            for path in self._paths:
                path.unlink(missing_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                self._fds.append(fd)
                os.write(fd, _MAGIC + session)
        except OSError as error:
            self._give_up(error)
        self._position = _HEADER_BYTES

    def add(self, record: Record) -> None:
        """A change that is no single entry."""
        self._end_puts()
        self._add_part(_RECORD, encode([record]))

    def _end_puts(self) -> None:
        if self.puts:
            self._add_part(_PUTS, self.puts.tobytes())
            del self.puts[:]

    def _add_part(self, kind: int, data: bytes) -> None:
        self._parts.append(_PART.pack(kind, len(data)))
        self._parts.append(data)

    def note(self) -> None:
        """Have what has changed outlive the process. To be called before a client is told of it."""
        if not self.puts and not self._parts:
            return
        self._end_puts()
        body = b"".join(self._parts)
        self._parts.clear()
        if not self._fds:
            return
        data = _NOTE.pack(len(body), zlib.crc32(body), self._number) + body
        try:
            while data:
                written = os.pwrite(self._fds[0], data, self._position)
                self._position += written
                data = data[written:]
        except OSError as error:
            self._give_up(error)

    def begin(self, sequence: int) -> None:
        """What has changed so far is packed for the frame behind `sequence`, the journal's last, which is durable."""
        self.note()
        if self._fds:
            self._fds.reverse()
            self._number = sequence + 2
            self._position = _HEADER_BYTES
            os.ftruncate(self._fds[0], _HEADER_BYTES)

    def stop(self) -> None:
        """Leave nothing behind."""
        for fd in self._fds:
            os.close(fd)
        for path in self._paths if self._fds else ():
            with contextlib.suppress(OSError):
                path.unlink()
        self._fds = []

    def _give_up(self, error: OSError) -> None:
        where = self._paths[0].parent
        log.warning("no notes in %s (%s): a killed daemon loses what was not flushed", where, error.strerror)
        self.stop()


def _is_ours(fd: int) -> bool:
    """Nobody else has written it: the directory is everybody's."""
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _records(bodies: Iterator[bytes]) -> Iterator[Record]:
    """Puts between two other records are joined, those of a layer in their order."""
    puts: list[bytes] = []
    for body in bodies:
        position = 0
        while position < len(body):
            kind, length = _PART.unpack_from(body, position)
            data = body[position + _PART.size : position + _PART.size + length]
            position += _PART.size + length
            if kind == _PUTS:
                puts.append(data)
            else:
                yield from _entries(puts)
                puts = []
                yield from decode(data)
    yield from _entries(puts)


def _entries(puts: list[bytes]) -> Iterator[Entries]:
    rows = np.frombuffer(b"".join(puts), dtype=np.uint64).reshape(-1, _ROW)
    for layer in np.unique(rows[:, 0]).tolist():
        of_layer = rows[rows[:, 0] == layer]
        yield Entries(layer, of_layer[:, 1].tobytes(), of_layer[:, 2].tobytes())

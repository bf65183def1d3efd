"""Reading tars that nobody vouches for: those of layers, as streams of pieces, and those of archives.

Python's tarfile reads the headers, in all the forms that tars have; what it makes of names, links and data is not used.
What it is too trusting in is here: headers are bounded in size, and a damaged one is an error and not the end.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Any, BinaryIO, Self

from nbdthin.errors import Invalid
from nbdthin.units import KiB, MiB

_HEADERS = 4 * MiB  # bytes of all headers of one member: its names, attributes and map of holes
_GLOBAL_HEADERS = 1000  # that count for all members, and cost something with each


class Tape:
    """The tar as tarfile reads it: forward only, and headers of a bounded size."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = b""
        self._at = 0  # in the chunk
        self._base = 0  # of the chunk, in the tar
        self._budget = 0

    def tell(self) -> int:
        return self._base + self._at

    def at_end(self) -> bool:
        """Whether no member begins here: nothing, or a block of zeroes. Headers may be read then."""
        self._budget = _HEADERS
        self._fill(tarfile.BLOCKSIZE)
        block = self._chunk[self._at : self._at + tarfile.BLOCKSIZE]
        return not block or (block[0] == 0 and not any(block))

    def read(self, size: int) -> bytes:
        self._budget -= size
        if self._budget < 0 or size < 0:
            raise tarfile.ReadError("its headers are larger than any member needs")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or as many as there are, at once: for what is small."""
        self._fill(size)
        data = self._chunk[self._at : self._at + size]
        self._at += len(data)
        return data

    def _fill(self, size: int) -> None:
        """Have `size` bytes in the chunk, or as many as there are."""
        if len(self._chunk) - self._at >= size:
            return
        parts = [self._chunk[self._at :]]
        have = len(parts[0])
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        self._base += self._at
        self._chunk, self._at = b"".join(parts), 0

    def seek(self, position: int) -> None:
        """Forward to `position`."""
        at = position - self._base
        if at < self._at:
            raise tarfile.ReadError("its headers point back")
        if at <= len(self._chunk):
            self._at = at
            return
        for _ in self.pieces(at - self._at):
            pass

    def pieces(self, size: int) -> Iterator[tuple[bytes, int, int]]:
        """The next `size` bytes, as parts of larger ones: each with its start and end. Fewer if the tar ends."""
        while size:
            start = self._at
            end = min(start + size, len(self._chunk))
            if start == end:
                self._base += end
                self._chunk, self._at = next(self._chunks, b""), 0
                if not self._chunk:
                    return
                continue
            self._at = end
            size -= end - start
            yield self._chunk, start, end

    def drain(self) -> None:
        """Take what is left: it counts for the digest."""
        for _ in self._chunks:
            pass


class FileTape(Tape):
    """A tar in a file: what is skipped is not read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(iter(lambda: file.read(64 * KiB), b""))
        self._file = file

    def seek(self, position: int) -> None:
        if position <= self._base + len(self._chunk):
            super().seek(position)
        else:
            self._file.seek(position)
            self._base, self._chunk, self._at = position, b"", 0


# name, mode, uid, gid, size, mtime, sum, type, link, prefix
_USTAR = Struct("100s8s8s8s12s12s8sc100s88x155s12x")


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """TarInfo's own, in a third of its time, for the usual: files, directories and links with octal numbers."""
        if len(buf) != tarfile.BLOCKSIZE:
            return super().frombuf(buf, encoding, errors)
        name, mode, uid, gid, size, mtime, checksum, kind, link, prefix = _USTAR.unpack(buf)
        try:
            # The checksum is the sum of all bytes, those of its own field taken for spaces. The low half of Adler-32 is
            # that sum plus 1, modulo its prime, and comes in a twentieth of the time of sum().
            total = _octal(checksum) - len(checksum) * ord(" ") + sum(checksum)
            usual = kind in b"0125" and (total + 1) % 65521 == zlib.adler32(buf) & 0xFFFF
            numbers = [_octal(field) for field in (mode, uid, gid, size, mtime)] if usual else []
        except ValueError:  # numbers in base 256, or left out
            numbers = []
        if not numbers:
            return super().frombuf(buf, encoding, errors)
        member = cls(_string(name).decode(encoding, errors))
        member.mode, member.uid, member.gid, member.size, member.mtime = numbers
        member.type = kind
        if kind in b"12":
            member.linkname = _string(link).decode(encoding, errors)
        elif kind == tarfile.DIRTYPE:
            member.name = member.name.rstrip("/")
        if prefix[0]:
            member.name = f"{_string(prefix).decode(encoding, errors)}/{member.name}"
        return member


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    return int(_string(field), 8)


class Headers(tarfile.TarFile):
    """A tar's members; `what` it is, for messages. TarFile's own `next` takes a damaged header for the end."""

    fileobj: Any

    def __init__(self, tape: Tape, what: str) -> None:
        self._what = what
        super().__init__(fileobj=tape, mode="r", encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]

    def next(self) -> tarfile.TarInfo | None:
        try:
            self.fileobj.seek(self.offset)
            if self.fileobj.at_end():
                return None
            member = _Member.fromtarfile(self)
        except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:
            raise Invalid(f"{self._what} is damaged at byte {self.offset}, or no tar at all: {error}") from None
        if len(self.pax_headers) > _GLOBAL_HEADERS:
            raise Invalid(f"{self._what} has more global headers than any tar needs")
        return member

    def all(self) -> Iterator[tarfile.TarInfo]:
        member = self.firstmember  # type: ignore[attr-defined]  # read by the constructor
        while member is not None:
            yield member
            member = self.next()


def shown(name: bytes | str) -> str:
    """A name for a message: one line whatever it has in it, and not too long."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"

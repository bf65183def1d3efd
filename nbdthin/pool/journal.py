"""Frames of opaque bytes that survive: segments, checkpoints, and reading them back.

    POOL/journal/N.log          a segment; its first frame has sequence number N (16 hexadecimal digits)
    POOL/journal/N.checkpoint   what frames 1 to N-1 amount to, in frames of its own, all numbered N
    POOL/journal/next           the segment after this one, written with zeroes in advance

Rules:
- a frame's header has a checksum of its own, so a damaged length is never taken for the end;
- behind a frame that does not check, any later frame that does means damage (`Corrupt`); at the very end it is what a
  power cut left of a write that nobody was told about, and is cut off;
- sequence numbers run without a gap over all segments;
- behind a frame that has been synced stands a mark, which says so and is not synced itself: damage to the very last
  frame is told from a torn one, once the kernel has written the mark back, and at once where only the process died;
- a segment that another one follows ends in a mark that says that;
- segments are filled with zeroes before use: an append changes no file size and no extent, so its sync writes nothing
  but the frame, and goes through even where the file system has no space left;
- where the file system has no room for another segment, nothing has been written: append raises NoSpace, and may be
  asked again; `starved` says that the next segment could not be prepared;
- a checkpoint takes effect by the rename of a complete, synced file; only then are older files removed.

This module gives no meaning to a payload.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nbdthin.errors import Corrupt, NoSpace
from nbdthin.pool.files import FILES, Files, open_file, read_file, write_all, write_file
from nbdthin.units import MiB

MAGIC = b"NBTJ"
VERSION = 1
HEADER = struct.Struct("<4sHHQIII")  # magic, version, kind, sequence, payload length, payload crc, header crc
FRAME, MARK, LAST_MARK = range(3)  # kinds; a mark is a header alone, with the number of the frame before it
SEGMENT_BYTES = 4 * MiB  # a part of the format: a shorter segment was cut off
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
MAX_PAYLOAD = 1 << 30
_HEADER_BODY = struct.Struct("<4sHHQII")
_LOG = re.compile(r"([0-9a-f]{16})\.log")
_CHECKPOINT = re.compile(r"([0-9a-f]{16})\.checkpoint")
_ZEROES = bytes(1 * MiB)
_SECTOR = 512  # what a disk writes whole, or not at all


class Frame(NamedTuple):
    sequence: int
    payload: bytes
    path: Path
    offset: int


def frame(sequence: int, payload: bytes) -> bytes:
    """`payload` with its header."""
    assert len(payload) <= MAX_PAYLOAD
    return _header(FRAME, sequence, payload) + payload


def _frames(sequence: int, payloads: Iterable[bytes]) -> Iterator[bytes]:
    """One after the other, as they are asked for: an expression would be compiled to a list of them all."""
    for payload in payloads:
        yield frame(sequence, payload)


def mark(sequence: int, kind: int = MARK) -> bytes:
    """What says that frame `sequence` is durable; as LAST_MARK, that another segment follows, too."""
    return _header(kind, sequence, b"")


def _is_torn_mark(data: bytes, offset: int, sequence: int) -> bool:
    """What is left of a mark that was written in part: it is not synced, may lie in two sectors, and may meet errors.

    In the last segment that is a torn tail like any other. Before a later segment, which begins with the next frame, it
    hides nothing.
    """
    found = data[offset : offset + HEADER.size].ljust(HEADER.size, b"\0")
    states = (bytes(HEADER.size), mark(sequence), mark(sequence, LAST_MARK))
    return any(found == a[:cut] + b[cut:] for cut in range(HEADER.size) for a in states for b in states)


def _header(kind: int, sequence: int, payload: bytes) -> bytes:
    body = _HEADER_BODY.pack(MAGIC, VERSION, kind, sequence, len(payload), zlib.crc32(payload))
    return body + zlib.crc32(body).to_bytes(4, "little")


def parse_frame(data: bytes | memoryview, offset: int) -> tuple[int, bytes] | None:
    """Sequence number and payload of the frame at `offset`, or None where there is no whole, sound frame."""
    header = parse_header(data, offset)
    if header is None or header.version != VERSION or header.kind != FRAME:
        return None
    start = offset + HEADER.size
    payload = bytes(data[start : start + header.length])
    if len(payload) != header.length or zlib.crc32(payload) != header.payload_crc:
        return None
    return header.sequence, payload


class Header(NamedTuple):
    version: int
    kind: int
    sequence: int
    length: int  # bytes of payload
    payload_crc: int

    @property
    def is_mark(self) -> bool:
        return self.version == VERSION and self.kind in (MARK, LAST_MARK) and self.length == 0


def parse_header(data: bytes | memoryview, offset: int) -> Header | None:
    """The header at `offset`, where one is whole and sound."""
    if len(data) - offset < HEADER.size:
        return None
    magic, version, kind, sequence, length, payload_crc, header_crc = HEADER.unpack_from(data, offset)
    if magic != MAGIC or zlib.crc32(data[offset : offset + _HEADER_BODY.size]) != header_crc:
        return None
    return Header(version, kind, sequence, length, payload_crc)


def _read_frame(fd: int, offset: int, sequence: int) -> bytes | None:
    """The payload of frame `sequence` at `offset` of a file; None where there is no such frame, whole and sound."""
    header = parse_header(os.pread(fd, HEADER.size, offset), 0)
    if header is None or (header.version, header.kind, header.sequence) != (VERSION, FRAME, sequence):
        return None
    payload = os.pread(fd, header.length, offset + HEADER.size)
    return payload if len(payload) == header.length and zlib.crc32(payload) == header.payload_crc else None


def _no_room() -> NoSpace:
    return NoSpace("the file system has no room for the pool's journal (free space there, or remove something)")


def may_be_torn(data: bytes | memoryview, offset: int) -> bool:
    """Whether a power cut can have left what stands at `offset`, with nothing sound behind it, of an append.

    Sectors are written whole. So the header is there, or what it was written over (a mark or zeroes), unless it spans
    two; and behind the frame's end nothing was written. 28 bytes alone are a damaged mark, which matters to nobody.
    """
    header = parse_header(data, offset)
    end = offset + HEADER.size
    if header is not None:
        return header.is_mark or not any(data[end + header.length :])
    spans = offset // _SECTOR != (end - 1) // _SECTOR
    return spans or not any(data[offset:end]) or not any(data[end:])


class Journal:
    """An open journal directory. Not thread-safe: one append at a time, checkpoints may be written beside it."""

    def __init__(self, directory: Path, files: Files = FILES) -> None:
        self.directory = directory
        self._files = files
        self.sequence = 0  # of the last frame appended
        self.bytes_since_checkpoint = 0
        self.checkpoint_bytes = 0
        self._fd = -1
        self._position = 0
        self._limit = 0  # where the prepared zeroes end
        self.next_ready = False  # the next segment's file exists
        self.starved = False  # the last try to make one found no space

    # -- opening

    @staticmethod
    def create(directory: Path, first_payload: bytes, files: Files = FILES) -> None:
        """A new journal that starts with the checkpoint `first_payload`: number 1 says that nothing was before."""
        Journal.create_at(directory, 1, [first_payload], files)

    @staticmethod
    def create_at(directory: Path, number: int, payloads: Iterable[bytes], files: Files = FILES) -> None:
        """A new journal that starts with `payloads` as checkpoint `number`, whole and durable when this returns."""
        files.mkdir(directory)
        journal = Journal(directory, files)
        journal.write_checkpoint(number, payloads)
        journal._prepare(journal._log_path(number))
        journal._prepare(directory / "next")
        files.sync_directory(directory)

    def load(self, apply: Callable[[Frame], None], *, repair_tail: bool = True) -> None:
        """Hand every frame to `apply`, the checkpoint's first, and make ready to append. Raises Corrupt.

        With `repair_tail` False nothing is written: for checks. Otherwise all that was read is durable afterwards: a
        process that was killed may have written it, and renamed files, without having come to the sync.
        """
        checkpoints = self._numbered(_CHECKPOINT)
        if not checkpoints:
            raise Corrupt(self.directory, None, "no checkpoint: this is not the journal of a pool, or it lost files")
        base, path = checkpoints[-1]
        for item in self._read_checkpoint(base, path):
            apply(item)
        self.checkpoint_bytes = path.stat().st_size
        self.sequence = base - 1
        segments = [(first, log) for first, log in self._numbered(_LOG) if first >= base]
        if not segments or segments[0][0] != base:
            raise Corrupt(self.directory, None, f"segment {base:016x}.log is missing")
        end = 0
        for index, (first, log) in enumerate(segments):
            if first != self.sequence + 1:
                raise Corrupt(log, 0, f"frames {self.sequence + 1} to {first - 1} are missing before this segment")
            end = self._replay(log, index == len(segments) - 1, apply)
            self.bytes_since_checkpoint += end
        if repair_tail:
            self._files.sync_directory(self.directory)  # before anything is removed or appended
            for leaving in self.directory.glob("*.new"):
                self._files.unlink(leaving)
            self._remove_before(base)
            self._open_segment(segments[-1][1], end)
            self._sync_loaded()
            self.next_ready = self._is_blank(self.directory / "next")

    def _sync_loaded(self) -> None:
        """Make durable what was read of the open segment. Where that fails, the next open reads what the disk has."""
        try:
            self._files.sync(self._fd)
        except OSError:
            self.drop_cache()
            raise

    def _numbered(self, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
        found = []
        for path in self.directory.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                found.append((int(match[1], 16), path))
        return sorted(found)

    def _read_checkpoint(self, number: int, path: Path) -> Iterator[Frame]:
        """Frame by frame: a checkpoint may be half of the memory that its pool takes."""
        with open(open_file(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise Corrupt(path, 0, "an empty checkpoint")
            offset = 0
            while offset < size:
                payload = _read_frame(file.fileno(), offset, number)
                if payload is None:
                    raise Corrupt(path, offset, "a checkpoint's frame does not check")
                yield Frame(number, payload, path, offset)
                offset += HEADER.size + len(payload)

    def _replay(self, path: Path, last: bool, apply: Callable[[Frame], None]) -> int:
        """Apply a segment's frames; the offset behind the last one."""
        data = read_file(path)
        if len(data) < SEGMENT_BYTES:
            raise Corrupt(path, len(data), f"the segment was cut off here: it was made with {SEGMENT_BYTES} bytes")
        offset = 0
        while (found := parse_frame(data, offset)) is not None:
            sequence, payload = found
            if sequence != self.sequence + 1:
                raise Corrupt(path, offset, f"frame {sequence} where frame {self.sequence + 1} belongs")
            apply(Frame(sequence, payload, path, offset))
            self.sequence = sequence
            offset += HEADER.size + len(payload)
        end = offset
        header = parse_header(data, offset)
        if header is not None and header.is_mark:
            if header.sequence != self.sequence:
                raise Corrupt(path, offset, f"a mark of frame {header.sequence} behind frame {self.sequence}")
            if last and header.kind == LAST_MARK:
                raise Corrupt(self.directory, None, f"segment {self.sequence + 1:016x}.log is missing")
            end += HEADER.size
        elif not last and _is_torn_mark(data, offset, self.sequence):
            end += HEADER.size
        rest = data[end:]
        if rest.count(0) != len(rest):
            self._refuse_damage(path, end, data, last)
            if not may_be_torn(data, offset):
                raise Corrupt(path, offset, "a damaged frame: this is not what a torn append leaves")
        return offset

    def _refuse_damage(self, path: Path, offset: int, data: bytes, last: bool) -> None:
        """Something follows the last sound frame: a torn tail may be cut, anything else is damage."""
        header = parse_header(data, offset)
        if header is not None and (header.version != VERSION or header.kind > LAST_MARK):
            raise Corrupt(path, offset, f"a frame of version {header.version}, made by a later nbdthin")
        later = data.find(MAGIC, offset + 1)
        while later >= 0:
            if parse_frame(data, later) is not None:
                raise Corrupt(path, offset, f"a damaged frame before a sound one at byte {later}")
            header = parse_header(data, later)
            if header is not None and header.is_mark:
                raise Corrupt(path, offset, f"a damaged frame, which was durable: byte {later} says so")
            later = data.find(MAGIC, later + 1)
        if not last:
            raise Corrupt(path, offset, "a damaged frame, and a later segment exists")

    # -- appending

    def append(self, payload: bytes) -> None:
        """Write the next frame and make it durable. After an OSError the journal must not be used again.

        Raises NoSpace, with nothing written, where there is no room for the segment that it takes.
        """
        files, sequence = self._files, self.sequence + 1
        data = frame(sequence, payload)
        end = len(data) + HEADER.size
        if self._position and self._position + end > self._limit:
            self._rotate()
        if self._position + end > self._limit:
            self._lengthen(self._position + end)
        write_all(files, self._fd, data, self._position)
        files.sync(self._fd)
        self._position += len(data)
        self.bytes_since_checkpoint += len(data)
        self.sequence = sequence
        self._mark(MARK)

    def _mark(self, kind: int) -> None:
        """Say behind the last frame that it is durable. An error is for the next sync to meet."""
        with contextlib.suppress(OSError):
            self._files.write(self._fd, mark(self.sequence, kind), self._position)

    @property
    def room(self) -> int:
        """Bytes that frames can still take before another segment is needed."""
        return max(self._limit - self._position, 0)

    @property
    def may_fit(self) -> bool:
        """Another segment may find its space now."""
        stat = os.statvfs(self.directory)
        return stat.f_bavail * stat.f_frsize >= SEGMENT_BYTES

    @property
    def low(self) -> bool:
        """The file system is full, and half of the open segment is used up: the rest is for what frees space."""
        return self.starved and self.room < SEGMENT_BYTES // 2

    @property
    def last(self) -> bool:
        """The same, and only a quarter is left: for commands that remove something, and what follows from them."""
        return self.starved and self.room < SEGMENT_BYTES // 4

    def _lengthen(self, end: int) -> None:
        """Fill the open segment with zeroes up to `end`. Raises NoSpace with nothing changed, or OSError."""
        try:
            for position in range(self._limit, end, len(_ZEROES)):
                write_all(self._files, self._fd, _ZEROES[: min(len(_ZEROES), end - position)], position)
            self._files.sync(self._fd)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self._files.truncate(self._fd, self._limit)
            raise _no_room() from error
        self._limit = end

    def _rotate(self) -> None:
        """Go on in a new segment. Raises NoSpace with nothing changed, or OSError."""
        path = self._log_path(self.sequence + 1)
        following = self.directory / "next"
        try:
            if self.next_ready:
                self._files.rename(following, path)
            else:
                self._prepare(path)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.starved = True
            raise _no_room() from error
        self._files.sync_directory(self.directory)
        self._mark(LAST_MARK)
        self._files.close(self._fd)
        self._fd = -1
        self._open_segment(path, 0)
        self.next_ready = False

    def prepare_next(self) -> None:
        """Have the next segment's space ready. To be called when there is time; append does without."""
        if not self.next_ready:
            try:
                self._prepare(self.directory / "next")
            except OSError as error:
                self.starved = error.errno in FULL_DISK
                raise
            self._files.sync_directory(self.directory)
            self.next_ready = True
        self.starved = False

    def _open_segment(self, path: Path, position: int) -> None:
        """Append to `path` from `position` on; what stands there is a torn tail, and goes.

        It is overwritten, not cut off: a segment that is shorter than it was made has lost something.
        """
        self._fd = self._files.open(path, 0)
        size = os.fstat(self._fd).st_size
        behind = position + HEADER.size if self._is_marked(position) else position
        if behind < size and any(os.pread(self._fd, size - behind, behind)):
            for start in range(behind, size, len(_ZEROES)):
                write_all(self._files, self._fd, memoryview(_ZEROES)[: size - start], start)
            self._sync_loaded()
        self._position = position
        self._limit = size

    @staticmethod
    def _is_blank(path: Path) -> bool:
        """A whole segment of zeroes is ready there."""
        if not path.is_file():
            return False
        data = path.read_bytes()
        return len(data) >= SEGMENT_BYTES and data.count(0) == len(data)

    def _is_marked(self, position: int) -> bool:
        header = parse_header(os.pread(self._fd, HEADER.size, position), 0)
        return header is not None and header.is_mark

    def _prepare(self, path: Path) -> None:
        write_file(self._files, path, [_ZEROES] * (SEGMENT_BYTES // len(_ZEROES)))

    def _log_path(self, first: int) -> Path:
        return self.directory / f"{first:016x}.log"

    # -- checkpoints

    def start_segment(self) -> int:
        """End the open segment; the number a checkpoint of everything so far has. Raises NoSpace or OSError."""
        if self._position:
            self._rotate()
        return self.sequence + 1

    def write_checkpoint(self, number: int, payloads: Iterable[bytes]) -> None:
        """Make `payloads` what frames up to `number` - 1 amount to. May run in a thread beside appends."""
        path = self.directory / f"{number:016x}.checkpoint"
        size = write_file(self._files, path, _frames(number, payloads))
        self._files.sync_directory(self.directory)
        self.checkpoint_bytes = size

    def finish_checkpoint(self, number: int) -> None:
        """Checkpoint `number` is in place: forget what it replaces."""
        self._remove_before(number)
        self.bytes_since_checkpoint = self._position

    def _remove_before(self, number: int) -> None:
        for pattern in (_LOG, _CHECKPOINT):
            for first, path in self._numbered(pattern):
                if first < number:
                    self._files.unlink(path)

    def drop_cache(self) -> None:
        """A sync failed: what the open segment is read as from now on is what the disk has."""
        if self._fd >= 0:
            self._files.drop_cache(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    @property
    def disk_bytes(self) -> int:
        """Bytes that the journal's files take."""
        total = 0
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by a checkpoint that ends meanwhile, in its thread
                total += path.stat().st_size
        return total

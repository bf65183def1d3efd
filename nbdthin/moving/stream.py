"""A snapshot, or what it differs in from another, as a stream of bytes: docs/stream.md describes every one.

Frames. The checksum of each is seeded with that of the frame before, so that a frame is only what it is in its place:
one that is damaged, missing, twice there or of another stream is found when it comes, and the last frame's checksum is
that of the whole. It finds damage, not malice: who can change a stream can give it other checksums, too.

What is given to a reader's caller has been verified; nothing here knows pools or sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import msgpack
import numpy as np
import xxhash
import zstandard

from nbdthin.control import codec
from nbdthin.errors import Corrupt, Invalid
from nbdthin.pool.commands import check_labels, check_size
from nbdthin.units import MiB

VERSION = 1
MAGIC = b"nbdthin stream\0\0"
FRAME = struct.Struct("<III")  # kind, number, length of the payload; a checksum of these and the payload comes between
CHECKSUM = struct.Struct("<Q")
COUNT = struct.Struct("<Q")  # records in a frame: the end of it, behind a PAIR for each, behind their data
PAIR = struct.Struct("<QQ")  # offset, and twice the length, plus 1 where there is data

MAX_PAYLOAD = 64 * MiB  # bytes, as they cross and as they are unpacked
FULL = 4 * MiB  # bytes of data after which a writer ends a frame
RECORDS = 1 << 16  # records after which it does
LEVEL = 1  # of zstd


class Kind(IntEnum):
    HEADER = 1
    RECORDS = 2
    END = 3


@dataclass(frozen=True, slots=True)
class Header:
    """What a stream is of. An identity is the same for a snapshot and all that were received from it."""

    version: int
    name: str  # where it was sent
    identity: str
    size: int
    labels: Mapping[str, str]
    base: str | None  # the identity of the snapshot that this is the difference to
    base_name: str | None  # where it was sent
    offset: int  # where the stream begins; what lies before came in an earlier one


class Record(NamedTuple):
    """Bytes from `offset` on: as `data`, or zeroes where that is None."""

    offset: int
    length: int
    data: memoryview | None


class Input(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Writer:
    """Makes the bytes of a stream, in this order: `header`, any number of `frame`s, `end`. Each returns parts."""

    def __init__(self) -> None:
        self._number = 0
        self._seed = xxhash.xxh3_64_intdigest(MAGIC)

    def header(self, header: Header) -> tuple[bytes, bytes]:
        head, payload = self._frame(Kind.HEADER, msgpack.packb(codec.plain(header)))
        return MAGIC + head, payload

    def frame(self, packed: bytes) -> tuple[bytes, bytes]:
        """Of what `Batch.packed` made."""
        return self._frame(Kind.RECORDS, packed)

    def end(self) -> tuple[bytes, bytes]:
        return self._frame(Kind.END, b"")

    def _frame(self, kind: Kind, payload: bytes) -> tuple[bytes, bytes]:
        head = FRAME.pack(kind, self._number, len(payload))
        self._number += 1
        self._seed = checksum(self._seed, head, payload)
        return head + CHECKSUM.pack(self._seed), payload


def checksum(seed: int, head: bytes, payload: bytes) -> int:
    digest = xxhash.xxh3_64(head, seed)
    digest.update(payload)
    return digest.intdigest()


class Batch:
    """The records of a frame, collected in a buffer that is used again and again: new memory costs page faults."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(FULL + MiB + RECORDS * PAIR.size + COUNT.size))
        self._pairs: list[int] = []
        self.data = 0  # bytes

    def clear(self) -> None:
        self._pairs.clear()
        self.data = 0

    def add(self, offset: int, data: memoryview) -> None:
        """Up to a MiB, to a batch that is not full."""
        self._pairs += (offset, len(data) << 1 | 1)
        self._buffer[self.data : self.data + len(data)] = data
        self.data += len(data)

    def add_zeroes(self, offset: int, length: int) -> None:
        self._pairs += (offset, length << 1)

    @property
    def full(self) -> bool:
        return self.data >= FULL or len(self._pairs) >= 2 * RECORDS

    def packed(self, level: int) -> bytes:
        """A frame's payload."""
        pairs = np.array(self._pairs, dtype="<u8").tobytes() + COUNT.pack(len(self._pairs) // 2)
        end = self.data + len(pairs)
        self._buffer[self.data : end] = pairs
        return zstandard.ZstdCompressor(level).compress(self._buffer[:end])


class Reader:
    """Reads a stream to its end. Raises Corrupt with the place where it goes wrong, and Invalid for what is none."""

    def __init__(self, source: Input, name: str) -> None:
        self._source = source
        self._name = name  # of where the stream comes from, for errors
        self._position = 0  # of the frame that is being read
        self._next = 0  # of what is behind it
        self._number = 0
        self._seed = xxhash.xxh3_64_intdigest(MAGIC)

    def header(self) -> Header:
        """First of all."""
        magic = self._source.read(len(MAGIC))
        self._next = len(magic)
        if not magic:
            raise Invalid(f"{self._name}: nothing came")
        if magic != MAGIC:
            raise Invalid(f"{self._name}: not a stream of `nbdthin send`")
        kind, payload = self._frame()
        if kind != Kind.HEADER:
            raise self._corrupt("there is no header")
        return self._checked(payload)

    def _checked(self, payload: bytes) -> Header:
        try:
            fields = msgpack.unpackb(payload)
        except (ValueError, msgpack.UnpackException) as error:
            raise self._corrupt("the header is no map") from error
        version = fields.get("version") if isinstance(fields, dict) else None
        if version != VERSION:
            raise Invalid(f"{self._name}: a stream of version {version!r}, of which this nbdthin knows nothing")
        header = codec.load(Header, fields)
        check_size(header.size)
        check_labels(header.labels)
        if not 0 <= header.offset <= header.size:
            raise self._corrupt("it begins outside of the snapshot")
        return header

    def records(self, size: int) -> Iterator[tuple[list[Record], int]]:
        """The records of each frame, and the end of the last of them. Ends when the whole stream has been verified."""
        reached = 0
        while True:
            kind, payload = self._frame()
            if kind == Kind.END:
                break
            if kind != Kind.RECORDS:
                raise self._corrupt(f"a frame of kind {kind}")
            records = self._unpacked(payload)
            for record in records:
                if record.offset < reached or record.length == 0 or record.offset + record.length > size:
                    raise self._corrupt("a record is out of order or outside of the snapshot")
                reached = record.offset + record.length
            yield records, reached
        self._position = self._next
        if payload or self._source.read(1):
            raise self._corrupt("something follows the end")

    def _unpacked(self, payload: bytes) -> list[Record]:
        try:
            if not 0 < zstandard.frame_content_size(payload) <= MAX_PAYLOAD:
                raise self._corrupt("a frame is too large")
            raw = memoryview(zstandard.ZstdDecompressor().decompress(payload))
        except zstandard.ZstdError as error:
            raise self._corrupt(f"a frame cannot be unpacked: {error}") from error
        count = COUNT.unpack(raw[-COUNT.size :])[0] if len(raw) >= COUNT.size else MAX_PAYLOAD
        start = len(raw) - COUNT.size - PAIR.size * count
        records = []
        position = 0
        if start >= 0:
            for offset, tagged in PAIR.iter_unpack(raw[start : -COUNT.size]):
                length, holds = tagged >> 1, tagged & 1
                records.append(Record(offset, length, raw[position : position + length] if holds else None))
                position += length if holds else 0
        if position != start:
            raise self._corrupt("a frame's records and its data do not match")
        return records

    def _frame(self) -> tuple[int, bytes]:
        self._position = self._next
        head = self._exactly(FRAME.size)
        kind, number, length = FRAME.unpack(head)
        (wanted,) = CHECKSUM.unpack(self._exactly(CHECKSUM.size))
        if length > MAX_PAYLOAD:
            raise self._corrupt("it is damaged (a frame's length)")
        payload = self._exactly(length)
        self._seed = checksum(self._seed, head, payload)
        if self._seed != wanted or number != self._number:
            raise self._corrupt("it is damaged (a frame's checksum)")
        self._number += 1
        return kind, payload

    def _exactly(self, length: int) -> bytes:
        data = self._source.read(length)
        self._next += len(data)
        if len(data) != length:
            raise self._corrupt("it ends in the middle")
        return data

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(self._name, self._position, f"the stream is not whole: {what}")

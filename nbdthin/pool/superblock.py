"""POOL/superblock, and the header that ties a data file to its pool. Written once, at `nbdthin init`.

The header carries a copy of the superblock, but for where the data is, so that either can be made from the other.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import msgpack

from nbdthin.errors import Corrupt, NotFound
from nbdthin.pool.files import FILES, Files, read_file, write_file
from nbdthin.units import KiB

MAGIC = b"nbdthin\0"
VERSION = 1
FEATURES: frozenset[str] = frozenset()  # what a pool may use that this version knows
DATA_MAGIC = b"nbdthin data\0\0\0\0"
DATA_HEADER = 4 * KiB  # bytes of block 0 that are written
_DATA_HEAD = struct.Struct("<16s16sI")  # magic, uuid, length of the copy; a CRC of it all and the copy follow


class LaterVersion(Corrupt):
    """Nothing is damaged, this version is too old: not to be repaired."""


@dataclass(frozen=True, slots=True)
class Superblock:
    uuid: str
    block_size: int  # bytes
    size: int  # bytes of the data file or device, header included
    data: str  # path; relative to the pool's directory unless absolute
    created: float
    version: int = VERSION
    features: tuple[str, ...] = ()

    def write(self, path: Path, files: Files = FILES) -> None:
        body = msgpack.packb(asdict(self))
        write_file(files, path, [MAGIC + zlib.crc32(body).to_bytes(4, "little") + body])

    def data_header(self) -> bytes:
        """The first bytes of the data file: whose data this is."""
        values = asdict(self)
        del values["data"]
        copy: bytes = msgpack.packb(values)
        head = _DATA_HEAD.pack(DATA_MAGIC, uuid.UUID(self.uuid).bytes, len(copy))
        return (head + zlib.crc32(copy, zlib.crc32(head)).to_bytes(4, "little") + copy).ljust(DATA_HEADER, b"\0")


def read_superblock(path: Path) -> Superblock:
    """Raises NotFound where there is none, Corrupt where it does not check or is of a later version."""
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise NotFound(f"no pool at {path.parent} (`nbdthin init {path.parent}` makes one)") from error
    except NotADirectoryError as error:
        raise NotFound(f"no pool at {path.parent}: a pool is a directory") from error
    head = len(MAGIC) + 4
    if len(data) < head or data[: len(MAGIC)] != MAGIC:
        raise Corrupt(path, 0, "not a pool's superblock")
    body = data[head:]
    if zlib.crc32(body).to_bytes(4, "little") != data[len(MAGIC) : head]:
        raise Corrupt(path, len(MAGIC), "the superblock is damaged: its checksum does not match")
    return _superblock(path, body)


def parse_data_header(path: Path, header: bytes, data: str) -> Superblock:
    """The superblock of which the header of the data file at `path` has a copy. Raises Corrupt as above."""
    magic, _, length = _DATA_HEAD.unpack_from(header.ljust(DATA_HEADER, b"\0"))
    if magic != DATA_MAGIC:
        raise Corrupt(path, 0, "not the data of a pool")
    crc, start = header[_DATA_HEAD.size : _DATA_HEAD.size + 4], _DATA_HEAD.size + 4
    copy, rest = header[start : start + length], header[start + length :]
    if zlib.crc32(copy, zlib.crc32(header[: _DATA_HEAD.size])).to_bytes(4, "little") != crc or any(rest):
        raise Corrupt(path, 0, "the data's header is damaged: its checksum does not match")
    return _superblock(path, copy, {"data": data})


def _superblock(path: Path, body: bytes, more: Mapping[str, object] = MappingProxyType({})) -> Superblock:
    values = {**msgpack.unpackb(body), **more}
    unknown = sorted(set(values.get("features", ())) - FEATURES)
    if values.get("version", 0) > VERSION or unknown:
        raise LaterVersion(path, None, f"made by a later version of nbdthin (needs {', '.join(unknown) or 'it'})")
    values["features"] = tuple(values["features"])
    return Superblock(**{field.name: values[field.name] for field in fields(Superblock)})

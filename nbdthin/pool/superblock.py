"""POOL/superblock, and the header that ties a data file to its pool. Written once, at `nbdthin init`."""

from __future__ import annotations

import uuid
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import msgpack

from nbdthin.errors import Corrupt, NotFound
from nbdthin.pool.files import FILES, Files, write_file
from nbdthin.units import KiB

MAGIC = b"nbdthin\0"
VERSION = 1
FEATURES: frozenset[str] = frozenset()  # what a pool may use that this version knows
DATA_MAGIC = b"nbdthin data\0\0\0\0"
DATA_HEADER = 4 * KiB  # bytes of block 0 that are written


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
        body = DATA_MAGIC + uuid.UUID(self.uuid).bytes
        return (body + zlib.crc32(body).to_bytes(4, "little")).ljust(DATA_HEADER, b"\0")


def read_superblock(path: Path) -> Superblock:
    """Raises NotFound where there is none, Corrupt where it does not check or is of a later version."""
    try:
        data = path.read_bytes()
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
    values = msgpack.unpackb(body)
    unknown = sorted(set(values.get("features", ())) - FEATURES)
    if values.get("version", 0) > VERSION or unknown:
        raise Corrupt(path, None, f"made by a later version of nbdthin (needs {', '.join(unknown) or 'it'})")
    values["features"] = tuple(values["features"])
    return Superblock(**{field.name: values[field.name] for field in fields(Superblock)})

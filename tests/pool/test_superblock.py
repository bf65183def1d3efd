"""POOL/superblock and the data file's header, byte by byte, and every way in which they are refused."""

from __future__ import annotations

import struct
import uuid
import zlib
from pathlib import Path

import msgpack
import pytest

from nbdthin.errors import Corrupt, Error, Invalid, NotFound
from nbdthin.pool.pool import Pool
from nbdthin.pool.superblock import Superblock, parse_data_header, read_superblock
from nbdthin.units import KiB, MiB

from .conftest import Pools, flip

EXAMPLE = Superblock(
    uuid="00112233-4455-6677-8899-aabbccddeeff", block_size=64 * KiB, size=MiB, data="data", created=1.5
)


def fields(path: Path) -> dict[str, object]:
    """The superblock taken apart by hand."""
    data = path.read_bytes()
    magic, checksum = struct.unpack_from("<8sI", data)
    assert magic == b"nbdthin\0"
    assert checksum == zlib.crc32(data[12:])
    values: dict[str, object] = msgpack.unpackb(data[12:])
    return values


def write(path: Path, values: object) -> None:
    body = msgpack.packb(values)
    path.write_bytes(b"nbdthin\0" + struct.pack("<I", zlib.crc32(body)) + body)


def test_a_superblock_is_these_bytes(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path / "superblock")
    body = (
        b"\x87\xa4uuid\xd9\x2400112233-4455-6677-8899-aabbccddeeff\xaablock_size\xce\x00\x01\x00\x00\xa4size\xce\x00\x10\x00\x00"
        b"\xa4data\xa4data\xa7created\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00\xa7version\x01\xa8features\x90"
    )
    expected = b"nbdthin\0" + struct.pack("<I", zlib.crc32(body)) + body
    assert (tmp_path / "superblock").read_bytes() == expected
    assert read_superblock(tmp_path / "superblock") == EXAMPLE


def test_a_data_header_is_these_bytes() -> None:
    header = EXAMPLE.data_header()
    magic, identity, length, checksum = struct.unpack_from("<16s16sII", header)
    assert magic == b"nbdthin data\0\0\0\0"
    assert identity == uuid.UUID(EXAMPLE.uuid).bytes == bytes.fromhex("00112233445566778899aabbccddeeff")
    copy = (
        b"\x86\xa4uuid\xd9\x2400112233-4455-6677-8899-aabbccddeeff\xaablock_size\xce\x00\x01\x00\x00\xa4size\xce\x00\x10\x00\x00"
        b"\xa7created\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00\xa7version\x01\xa8features\x90"
    )
    assert checksum == zlib.crc32(header[:36] + copy)
    assert header[40:] == copy.ljust(4 * KiB - 40, b"\0") and length == len(copy)


def test_a_superblock_is_read_back_from_a_data_header_and_from_no_other_bytes() -> None:
    header = EXAMPLE.data_header()
    assert parse_data_header(Path("disk"), header, "data") == EXAMPLE
    for offset in range(len(header)):
        damaged = bytearray(header)
        damaged[offset] ^= 0x10
        with pytest.raises(Corrupt):
            parse_data_header(Path("disk"), bytes(damaged), "data")


def test_a_new_pool_has_the_files_that_format_md_lists(pools: Pools) -> None:
    pool = pools.make(size=MiB)
    assert {path.name for path in pool.path.iterdir()} == {"superblock", "data", "sums", "journal", "lock"}
    values = fields(pool.path / "superblock")
    assert list(values) == ["uuid", "block_size", "size", "data", "created", "version", "features"]
    assert (values["block_size"], values["size"], values["data"]) == (64 * KiB, MiB, "data")
    with open(pool.path / "data", "rb") as file:
        assert file.read(4 * KiB) == pool.superblock.data_header()
    assert (pool.path / "data").stat().st_size == MiB


def test_every_flipped_byte_of_a_superblock_is_refused_in_one_line(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB)) / "superblock"
    for offset in range(path.stat().st_size):
        flip(path, offset)
        with pytest.raises(Corrupt) as caught:
            Pool.open(path.parent)
        assert caught.value.path == path
        assert "\n" not in str(caught.value)
        flip(path, offset)


def test_a_superblock_cut_anywhere_is_refused(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB)) / "superblock"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Corrupt):
            Pool.open(path.parent)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features", ["compression"], "made by a later version of nbdthin .needs compression"),
        ("features", ["zstd", "compression"], "compression, zstd"),
        ("version", 2, "made by a later version"),
    ],
)
def test_a_pool_of_a_later_version_is_refused_and_says_what_it_needs(
    pools: Pools, key: str, value: object, message: str
) -> None:
    path = pools.close(pools.make(size=MiB)) / "superblock"
    write(path, fields(path) | {key: value})
    with pytest.raises(Corrupt, match=message) as caught:
        Pool.open(path.parent)
    assert "\n" not in str(caught.value)


def test_a_later_version_may_have_fields_of_another_shape(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB)) / "superblock"
    write(path, {"version": 2, "features": []})
    with pytest.raises(Corrupt, match="later version"):
        Pool.open(path.parent)


def test_a_field_that_is_not_known_is_passed_over(pools: Pools) -> None:
    """What a reader may ignore needs no feature: FORMAT.md, how to extend."""
    pool = pools.make(size=MiB)
    path = pools.close(pool) / "superblock"
    write(path, fields(path) | {"comment": "by hand"})
    assert pools.open(path.parent).superblock == pool.superblock


def test_a_pool_that_is_not_there_is_named_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nbdthin init"):
        Pool.open(tmp_path / "nothing")


def test_a_file_in_the_place_of_a_pool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFound, match="a pool is a directory"):
        Pool.open(tmp_path / "file")


def test_data_of_another_pool_is_refused(pools: Pools) -> None:
    one, two = pools.close(pools.make(size=MiB)), pools.close(pools.make(size=MiB))
    (two / "data").rename(one / "data")
    with pytest.raises(Corrupt, match="not the data of this pool") as caught:
        Pool.open(one)
    assert (caught.value.path, caught.value.offset) == (one / "data", 0)


def test_a_damaged_data_header_is_refused(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB))
    for offset in (0, 16, 32, 36, 4 * KiB - 1):
        flip(path / "data", offset)
        with pytest.raises(Corrupt, match="header is damaged"):
            Pool.open(path)
        flip(path / "data", offset)
    pools.open(path)


def test_missing_data_is_named(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB))
    (path / "data").unlink()
    with pytest.raises(NotFound, match="data is missing"):
        Pool.open(path)


def test_truncated_data_is_refused_with_both_sizes(pools: Pools) -> None:
    path = pools.close(pools.make(size=MiB))
    with open(path / "data", "r+b") as file:
        file.truncate(MiB - 1)
    with pytest.raises(Invalid, match="has 1048575 bytes, the pool needs 1048576"):
        Pool.open(path)


def test_what_refused_to_open_can_be_opened_once_it_is_mended(pools: Pools) -> None:
    """A refusal holds no lock and no file."""
    path = pools.close(pools.make(size=MiB))
    for broken in (path / "superblock", path / "data"):
        flip(broken, 0)
        with pytest.raises(Error):
            Pool.open(path)
        flip(broken, 0)
    pools.open(path)

"""The bytes of a stream, taken apart by the document alone; and what a reader refuses."""

from __future__ import annotations

import io
import struct

import msgpack
import pytest
import xxhash
import zstandard

from nbdthin.errors import Corrupt, Error, Invalid
from nbdthin.moving.stream import Batch, Header, Reader, Record, Writer, checksum
from nbdthin.units import MiB

HEADER = Header(
    version=1,
    name="web@2",
    identity="0123456789abcdef0123456789abcdef",
    size=MiB,
    labels={"role": "front"},
    base=None,
    base_name=None,
    offset=0,
)
MAGIC = b"nbdthin stream\0\0"


def packed(*records: tuple[int, int, bytes | None]) -> bytes:
    batch = Batch()
    for offset, length, data in records:
        if data is None:
            batch.add_zeroes(offset, length)
        else:
            batch.add(offset, memoryview(data))
    return batch.packed(3)


def joined(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"".join(each) for each in parts)


def stream() -> bytes:
    writer = Writer()
    return joined(
        writer.header(HEADER),
        writer.frame(packed((0, 5, b"hello"), (4096, 8192, None), (65536, 3, b"abc"))),
        writer.frame(packed((MiB - 1, 1, b"z"))),
        writer.end(),
    )


def read(data: bytes) -> tuple[Header, list[Record]]:
    reader = Reader(io.BytesIO(data), "the test")
    header = reader.header()
    return header, [record for records, _ in reader.records(header.size) for record in records]


def frames(data: bytes) -> list[bytes]:
    """The magic, and every frame."""
    parts = [data[:16]]
    position = 16
    while position < len(data):
        length = struct.unpack_from("<I", data, position + 8)[0]
        parts.append(data[position : position + 20 + length])
        position += 20 + length
    return parts


def framed(*payloads: tuple[int, bytes]) -> bytes:
    """A stream with right checksums of whatever is given, as the document says."""
    seed = xxhash.xxh3_64_intdigest(MAGIC)
    out = MAGIC
    for number, (kind, payload) in enumerate(payloads):
        head = struct.pack("<III", kind, number, len(payload))
        seed = xxhash.xxh3_64_intdigest(head + payload, seed)
        out += head + struct.pack("<Q", seed) + payload
    return out


def test_a_stream_is_what_the_document_says() -> None:
    magic, header, first, second, end = frames(stream())
    assert magic == MAGIC
    seed = xxhash.xxh3_64_intdigest(magic)
    for number, (kind, frame) in enumerate(((1, header), (2, first), (2, second), (3, end))):
        head, payload = frame[:12], frame[20:]
        assert struct.unpack("<III", head) == (kind, number, len(payload))
        seed = xxhash.xxh3_64_intdigest(head + payload, seed)
        assert struct.unpack("<Q", frame[12:20]) == (seed,)
    assert msgpack.unpackb(header[20:]) == {
        "version": 1,
        "name": "web@2",
        "identity": "0123456789abcdef0123456789abcdef",
        "size": MiB,
        "labels": {"role": "front"},
        "base": None,
        "base_name": None,
        "offset": 0,
    }
    raw = zstandard.ZstdDecompressor().decompress(first[20:])
    assert raw[:8] == b"helloabc"
    assert struct.unpack("<7Q", raw[8:]) == (0, 11, 4096, 16384, 65536, 7, 3)
    assert end[20:] == b""


def test_what_is_written_is_read() -> None:
    header, records = read(stream())
    assert header == HEADER
    assert [(offset, length, data and bytes(data)) for offset, length, data in records] == [
        (0, 5, b"hello"),
        (4096, 8192, None),
        (65536, 3, b"abc"),
        (MiB - 1, 1, b"z"),
    ]


def test_every_flipped_byte_is_refused() -> None:
    whole = stream()
    for position in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            with pytest.raises(Error) as caught:
                read(bytes(damaged))
            assert "\n" not in str(caught.value)


def test_every_truncation_is_refused() -> None:
    whole = stream()
    for length in range(len(whole)):
        with pytest.raises(Error):
            read(whole[:length])


def test_frames_that_are_not_in_their_place_are_refused() -> None:
    magic, header, first, second, end = frames(stream())
    for wrong in (
        (magic, header, second, first, end),
        (magic, header, first, first, second, end),
        (magic, header, second, end),
        (magic, header, first, second),
        (magic, header, end),
        (magic, first, second, end),
        (magic, header, first, second, end, end),
        (magic, header, first, second, end, magic),
        (magic, header, header, first, second, end),
    ):
        with pytest.raises(Corrupt, match="the stream is not whole"):
            read(b"".join(wrong))


def test_a_frame_of_another_stream_is_refused() -> None:
    writer = Writer()
    other = joined(writer.header(Header(1, "web@3", HEADER.identity, MiB, {}, None, None, 0)))
    _, _, first, second, end = frames(stream())
    with pytest.raises(Corrupt):
        read(other + first + second + end)


def test_damage_is_reported_with_its_place() -> None:
    whole = stream()
    _, header, first, _, _ = frames(whole)
    at = 16 + len(header) + len(first)
    damaged = bytearray(whole)
    damaged[at + 25] ^= 1
    with pytest.raises(Corrupt, match=rf"the test at byte {at}: the stream is not whole: it is damaged"):
        read(bytes(damaged))


def _packed(count: int, pairs: list[int], data: bytes = b"") -> bytes:
    raw = data + struct.pack(f"<{len(pairs) + 1}Q", *pairs, count)
    return zstandard.ZstdCompressor().compress(raw)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no zstd at all",
        zstandard.ZstdCompressor().compress(b"1234"),
        _packed(2, [0, 2]),
        _packed(1 << 60, [0, 2]),
        _packed(1, [0, 2 * 4 + 1], b"abc"),
        _packed(1, [0, 2 * 3 + 1], b"abcd"),
        _packed(1, [0, 0]),
        _packed(1, [MiB, 2]),
        _packed(1, [MiB - 1, 4]),
        _packed(1, [(1 << 64) - 1, (1 << 64) - 2]),
        _packed(2, [4096, 2, 0, 2]),
        _packed(2, [0, 4, 1, 2]),
        _packed(0, [], bytes(65 * MiB)),
        _packed(1, [0, 2])[:-2],
        zstandard.ZstdCompressor(write_content_size=False).compress(struct.pack("<3Q", 0, 2, 1)),
    ],
)
def test_records_that_do_not_add_up_are_refused_although_their_checksum_is_right(payload: bytes) -> None:
    header = frames(stream())[1][20:]
    with pytest.raises(Corrupt):
        read(framed((1, header), (2, payload), (3, b"")))


def test_records_ascend_over_frames_too() -> None:
    header = frames(stream())[1][20:]
    with pytest.raises(Corrupt, match="out of order"):
        read(framed((1, header), (2, _packed(1, [8192, 2])), (2, _packed(1, [0, 2])), (3, b"")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "a stream of version 2"),
        ({"size": 0}, "not a volume's size"),
        ({"size": "1M"}, "size: an integer is wanted"),
        ({"size": 1 << 63}, "not a volume's size"),
        ({"offset": MiB + 1}, "outside of the snapshot"),
        ({"offset": -1}, "outside of the snapshot"),
        ({"labels": {"a=b": "c"}}, "not a label"),
        ({"labels": {"a": 1}}, "text is wanted"),
        ({"later": True}, "unknown"),
        ({"name": None}, "text is wanted"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(changes: dict[str, object], said: str) -> None:
    fields = msgpack.unpackb(frames(stream())[1][20:]) | changes
    with pytest.raises((Invalid, Corrupt), match=said):
        read(framed((1, msgpack.packb(fields)), (3, b"")))


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(Invalid, match="nothing came"):
        read(b"")
    with pytest.raises(Invalid, match="not a stream"):
        read(b"QFI\xfb" + bytes(100))
    with pytest.raises(Corrupt, match="a frame's length"):
        read(MAGIC + struct.pack("<IIIQ", 1, 0, 1 << 31, 0))
    with pytest.raises(Corrupt, match="no header"):
        read(framed((3, b"")))
    with pytest.raises(Corrupt, match="no map"):
        read(framed((1, b"\xc1"), (3, b"")))
    with pytest.raises(Corrupt, match="a frame of kind 9"):
        read(framed((1, frames(stream())[1][20:]), (9, b""), (3, b"")))
    with pytest.raises(Corrupt, match="something follows"):
        read(framed((1, frames(stream())[1][20:]), (3, b"x")))


def test_an_empty_difference_is_a_stream() -> None:
    writer = Writer()
    assert read(joined(writer.header(HEADER), writer.end())) == (HEADER, [])


def test_checksums_hang_on_what_came_before() -> None:
    assert checksum(1, b"head", b"payload") != checksum(2, b"head", b"payload")

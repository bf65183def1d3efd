"""Records byte by byte, as FORMAT.md has them: taken apart with msgpack and struct alone."""

from __future__ import annotations

import struct

import msgpack
import pytest

from nbdthin.pool import records
from nbdthin.pool.records import (
    BadRecord,
    Counter,
    End,
    Entries,
    Layer,
    Leaf,
    Name,
    Record,
    Size,
    Unname,
    Uuid,
    decode,
    encode,
    u64,
)

GOLDEN: list[tuple[Record, str, object]] = [
    (Layer(5, 3), "9193010503", [1, 5, 3]),
    (
        Name("web@1", True, 5, 1 << 30, 1.5, {"os": "debian"}),
        "919a02a57765624031c305ce40000000cb3ff800000000000081a26f73a664656269616e000000",
        [2, "web@1", True, 5, 1 << 30, 1.5, {"os": "debian"}, 0, 0, 0],
    ),
    (
        Name("web", False, 6, 1 << 30, 1.5, {}, quota=1 << 20, reservation=1 << 16, origin=5),
        "919a02a3776562c206ce40000000cb3ff800000000000080ce00100000ce0001000005",
        [2, "web", False, 6, 1 << 30, 1.5, {}, 1 << 20, 1 << 16, 5],
    ),
    (Unname("web@1"), "919203a57765624031", [3, "web@1"]),
    (
        Entries(5, u64([7, 600]), u64([0x0000000900000001, 0xFFFF0000])),
        "91940405c410" + "0700000000000000" + "5802000000000000" + "c410" + "0100000009000000" + "0000ffff00000000",
        [4, 5, struct.pack("<QQ", 7, 600), struct.pack("<QQ", 0x0000000900000001, 0xFFFF0000)],
    ),
    (
        Leaf(5, 2, u64([1 << 32 | 1] + [0] * 511)),
        "9194050502c51000" + "0100000001000000" + "00" * 4088,
        [5, 5, 2, struct.pack("<Q", 1 << 32 | 1) + bytes(4088)],
    ),
    (Leaf(5, 2, b""), "9194050502c400", [5, 5, 2, b""]),
    (Counter(9), "91920609", [6, 9]),
    (End(12), "9192070c", [7, 12]),
    (Size(1 << 30), "919208ce40000000", [8, 1 << 30]),
    (
        Uuid("00112233-4455-6677-8899-aabbccddeeff"),
        "919209d924" + b"00112233-4455-6677-8899-aabbccddeeff".hex(),
        [9, "00112233-4455-6677-8899-aabbccddeeff"],
    ),
]


@pytest.mark.parametrize(("record", "golden", "fields"), GOLDEN, ids=lambda value: type(value).__name__)
def test_a_record_is_these_bytes(record: Record, golden: str, fields: object) -> None:
    assert encode([record]).hex() == golden
    assert msgpack.unpackb(bytes.fromhex(golden)) == [fields]
    assert decode(bytes.fromhex(golden)) == [record]


def test_every_kind_of_record_has_its_bytes_above() -> None:
    assert {type(record) for record, _, _ in GOLDEN} == set(records._TYPES.values())


def test_a_payload_is_a_list_of_records_in_order() -> None:
    payload = encode([Layer(1, 0), Counter(2)])
    assert payload.hex() == "92" + "93010100" + "920602"
    assert decode(payload) == [Layer(1, 0), Counter(2)]


def test_an_empty_list_is_a_payload() -> None:
    assert decode(encode([])) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x01",
        b"\xc0",
        b"\x91",
        b"\x91\x01",
        b"\x91\x90",
        b"\x91\x92\x00\x01",  # tag 0
        b"\x91\x92\x0a\x01",  # the tag after the last
        b"\x91\x92\xff\x01",
        b"\x91\x92\xa11\x01",  # a tag that is text
        b"\x91\x92\x01\x01",  # too few fields
        b"\x91\x94\x01\x01\x00\x00",  # too many
        encode([Counter(1)]) + b"\x00",  # something behind it
        encode([Counter(1)])[:-1],
    ],
    ids=str,
)
def test_what_is_no_list_of_known_records_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRecord):
        decode(payload)

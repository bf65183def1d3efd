"""One wrong byte is put right from the checksums; two are not taken for one."""

from __future__ import annotations

import random
import zlib

import pytest

from nbdthin.pool.journal import HEADER, frame, parse_header
from nbdthin.pool.mend import MOST_BYTE, flips, mend_header, mend_payload
from nbdthin.units import KiB

from .conftest import pattern


@pytest.mark.parametrize("length", [1, 2, 100, 5000, MOST_BYTE])
def test_a_wrong_byte_is_told_from_every_other(length: int) -> None:
    chance = random.Random(length)
    data = pattern(length)
    for _ in range(20):
        damaged = bytearray(data)
        position, change = chance.randrange(length), chance.randrange(1, 256)
        damaged[position] ^= change
        assert flips(bytes(damaged), zlib.crc32(data)) == [(position, change)]
    assert flips(data, zlib.crc32(data)) == []


def test_every_wrong_byte_of_a_header_is_put_right() -> None:
    payload = pattern(40)
    made = frame(7, payload)
    for offset in range(HEADER.size):
        damaged = bytearray(made + b"behind")
        damaged[offset] ^= 1 << offset % 8
        assert parse_header(bytes(damaged), 0) is None
        mended = mend_header(bytes(damaged), 0, len(made), 7)
        assert mended is not None and mended.payload == payload, offset


def test_a_header_of_another_number_is_not_made_to_fit() -> None:
    """The payload's checksum is gone and the header's disagrees: nothing says that this is frame 8."""
    damaged = bytearray(frame(7, pattern(40)))
    damaged[20] ^= 1
    assert mend_header(bytes(damaged), 0, len(damaged), 8) is None


def test_a_payload_of_more_than_one_wrong_byte_is_lost() -> None:
    chance = random.Random(1)
    for length in (50, 3000, 16 * KiB):
        made = frame(7, pattern(length))
        header = parse_header(made, 0)
        assert header is not None
        for _ in range(20):
            payload = bytearray(made[HEADER.size :])
            start = chance.randrange(length - 20)
            payload[start : start + 20] = chance.randbytes(20)
            assert mend_payload(bytes(payload), header, 0) is None


def test_in_a_large_payload_a_wrong_bit_is_put_right_and_a_wrong_byte_is_not() -> None:
    made = frame(7, pattern(300 * KiB))
    header = parse_header(made, 0)
    assert header is not None
    for change, right in ((0x10, True), (0x11, False)):
        payload = bytearray(made[HEADER.size :])
        payload[200_000] ^= change
        mended = mend_payload(bytes(payload), header, 0)
        assert (mended is not None) == right
        if mended is not None:
            assert mended.payload == made[HEADER.size :] and "byte 200028 is" in mended.how

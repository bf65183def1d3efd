"""The numbers and layouts, against the protocol document's own values."""

from __future__ import annotations

from struct import Struct

import pytest

from nbdthin.wire import proto


def test_the_handshake_magics_are_the_text_they_spell() -> None:
    assert proto.NBDMAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert proto.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (proto.GREETING, 18),
        (proto.CLIENT_FLAGS, 4),
        (proto.OPTION, 16),
        (proto.OPTION_REPLY, 20),
        (proto.EXPORT_NAME_REPLY, 10),
        (proto.INFO_EXPORT, 12),
        (proto.INFO_BLOCK_SIZE, 14),
        (proto.REQUEST, 28),
        (proto.SIMPLE_REPLY, 16),
        (proto.CHUNK, 20),
        (proto.OFFSET_DATA, 20 + 8),
        (proto.OFFSET_HOLE, 20 + 12),
        (proto.BLOCK_STATUS, 20 + 4),
        (proto.ERROR, 20 + 6),
    ],
)
def test_a_layout_is_big_endian_and_as_long_as_the_protocol_says(layout: Struct, size: int) -> None:
    assert layout.size == size
    assert layout.format.startswith(">")


def test_a_request_is_read_field_by_field() -> None:
    request = bytes.fromhex("25609513 0001 0006 0123456789abcdef 0000000100000000 fffffe00")
    assert proto.REQUEST.unpack(request) == (
        proto.REQUEST_MAGIC,
        proto.CommandFlag.FUA,
        proto.Command.WRITE_ZEROES,
        0x0123456789ABCDEF,
        1 << 32,
        (1 << 32) - 512,
    )


def test_the_export_name_reply_is_134_bytes_with_its_zeroes() -> None:
    assert proto.EXPORT_NAME_REPLY.size + len(proto.EXPORT_NAME_ZEROES) == 134
    assert not any(proto.EXPORT_NAME_ZEROES)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        ("EPERM", 1),
        ("EIO", 5),
        ("ENOMEM", 12),
        ("EINVAL", 22),
        ("ENOSPC", 28),
        ("EOVERFLOW", 75),
        ("ENOTSUP", 95),
        ("ESHUTDOWN", 108),
    ],
)
def test_an_error_has_the_protocols_number(error: str, number: int) -> None:
    assert proto.Errno[error] == number

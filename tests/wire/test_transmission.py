"""Which request is refused with what, and the bytes of every reply, against values written out by hand."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdthin.wire.handshake import ExportInfo, Negotiated
from nbdthin.wire.transmission import (
    Rules,
    block_status_chunk,
    data_chunk_header,
    errno_of,
    error_chunk,
    hole_chunk,
    legality,
    none_chunk,
    plain_lengths,
    refuse,
    simple_reply,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
WITH_RANGE = [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS]
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, ENOMEM, EINVAL, ENOSPC = 1, 5, 12, 22, 28
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 10 * GIB

CONTEXTS = ((1, "base:allocation"),)
PLAIN = legality(Negotiated(ExportInfo("web", SIZE, False), 0x0D6D, False, ()))
STRUCTURED = legality(Negotiated(ExportInfo("web", SIZE, False), 0x0DED, True, ()))
WITH_CONTEXT = legality(Negotiated(ExportInfo("web", SIZE, False), 0x0DED, True, CONTEXTS))
READ_ONLY = legality(Negotiated(ExportInfo("web@1", SIZE, True), 0x058F, True, CONTEXTS))


# Legality -------------------------------------------------------------------------------------------------

ALLOWED = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}


@pytest.mark.parametrize("command", ALLOWED)
@pytest.mark.parametrize("flag", [1 << bit for bit in range(16)])
def test_a_flag_is_legal_only_with_the_commands_it_is_documented_for(command: int, flag: int) -> None:
    refused = 0 if flag & ALLOWED[command] else EINVAL
    assert refuse(WITH_CONTEXT, command, flag, 0, 512, SIZE) == refused


def test_all_flags_of_a_command_may_come_together() -> None:
    for command, flags in ALLOWED.items():
        assert refuse(WITH_CONTEXT, command, flags, 0, 512, SIZE) == 0


@pytest.mark.parametrize("command", [READ, FLUSH, CACHE, BLOCK_STATUS])
def test_fua_is_taken_on_a_read_only_export_too(command: int) -> None:
    assert refuse(READ_ONLY, command, FUA, 0, 512, SIZE) == 0


def test_df_is_legal_only_with_structured_replies() -> None:
    assert refuse(PLAIN, READ, DF, 0, 512, SIZE) == EINVAL
    assert refuse(STRUCTURED, READ, DF, 0, 512, SIZE) == 0


def test_fast_zero_is_undocumented_where_it_was_not_advertised() -> None:
    rules = legality(Negotiated(ExportInfo("web", SIZE, False), 0x0D6D & ~0x800, False, ()))
    assert refuse(rules, WRITE_ZEROES, FAST_ZERO, 0, 512, SIZE) == EINVAL
    assert refuse(rules, WRITE_ZEROES, NO_HOLE, 0, 512, SIZE) == 0


@pytest.mark.parametrize("command", [8, 9, 255, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("rules", [PLAIN, WITH_CONTEXT, READ_ONLY])
def test_an_unknown_command_is_invalid(command: int, rules: dict[int, tuple[int, int, int, int, int]]) -> None:
    assert refuse(rules, command, 0, 0, 0, SIZE) == EINVAL


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (0, 0), (SIZE, 512), (2**64 - 1, 2**32 - 1)])
def test_what_writes_is_not_permitted_on_a_read_only_export(command: int, flags: int, offset: int, length: int) -> None:
    assert refuse(READ_ONLY, command, flags, offset, length, SIZE) == EPERM


BEYOND_END = {
    READ: EINVAL,
    WRITE: ENOSPC,
    TRIM: EINVAL,
    CACHE: EINVAL,
    WRITE_ZEROES: ENOSPC,
    BLOCK_STATUS: EINVAL,
}


@pytest.mark.parametrize("command", BEYOND_END)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE - 512, 1024),
        (SIZE + 1, 1),
        (2**63, 512),
        (2**64 - 512, 512),  # the end is 2^64, which is 0 where integers wrap
        (2**64 - 512, 1024),
        (2**64 - 1, MIB),
    ],
)
def test_a_range_beyond_the_end_is_refused_without_wrapping(command: int, offset: int, length: int) -> None:
    assert refuse(WITH_CONTEXT, command, 0, offset, length, SIZE) == BEYOND_END[command]


@pytest.mark.parametrize("command", WITH_RANGE)
def test_the_last_byte_is_inside(command: int) -> None:
    assert refuse(WITH_CONTEXT, command, 0, SIZE - 1, 1, SIZE) == 0
    assert refuse(WITH_CONTEXT, command, 0, SIZE - 513, 513, SIZE) == 0


def test_the_bounds_are_those_of_the_size_now() -> None:
    assert refuse(PLAIN, WRITE, 0, SIZE, 512, SIZE) == ENOSPC
    assert refuse(PLAIN, WRITE, 0, SIZE, 512, SIZE + 512) == 0


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("offset", [0, 1, SIZE])
def test_length_zero_is_legal(command: int, offset: int) -> None:
    assert refuse(WITH_CONTEXT, command, 0, offset, 0, SIZE) == 0


def test_the_status_of_nothing_is_invalid_because_no_chunk_can_tell_it() -> None:
    assert refuse(WITH_CONTEXT, BLOCK_STATUS, 0, 0, 0, SIZE) == EINVAL


@pytest.mark.parametrize("command", [READ, WRITE])
def test_data_is_limited_to_64_mib(command: int) -> None:
    assert refuse(PLAIN, command, 0, 0, 49_865_728, SIZE) == 0
    assert refuse(PLAIN, command, 0, 0, 64 * MIB, SIZE) == 0
    assert refuse(PLAIN, command, 0, 0, 64 * MIB + 1, SIZE) == EINVAL
    assert refuse(PLAIN, command, 0, 0, 2**32 - 1, SIZE) == EINVAL


@pytest.mark.parametrize("command", [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize("length", [64 * MIB + 1, 4 * GIB - 512, 2**32 - 1])
def test_requests_without_data_may_be_longer(command: int, length: int) -> None:
    assert refuse(WITH_CONTEXT, command, 0, 0, length, SIZE) == 0


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (512, 512), (2**64 - 1, 2**32 - 1)])
def test_offset_and_length_of_a_flush_mean_nothing(offset: int, length: int) -> None:
    for rules in (PLAIN, READ_ONLY):
        assert refuse(rules, FLUSH, 0, offset, length, SIZE) == 0


@pytest.mark.parametrize("flags", [0, FUA, DF, PAYLOAD_LEN, 0xFFFF])
def test_disc_is_never_refused(flags: int) -> None:
    for rules in (PLAIN, WITH_CONTEXT, READ_ONLY):
        assert refuse(rules, DISC, flags, 2**64 - 1, 2**32 - 1, SIZE) == 0


@pytest.mark.parametrize("rules", [PLAIN, STRUCTURED, WITH_CONTEXT, READ_ONLY])
def test_what_passes_without_being_asked_for_is_never_refused(rules: Rules) -> None:
    passing = plain_lengths(rules)
    assert set(passing) == ({READ} if rules is READ_ONLY else {READ, WRITE})
    for command, longest in passing.items():
        for length in (1, 512, longest):
            assert refuse(rules, command, 0, 0, length, longest) == 0


def test_block_status_needs_a_selected_context() -> None:
    assert refuse(STRUCTURED, BLOCK_STATUS, 0, 0, 512, SIZE) == EINVAL
    assert refuse(PLAIN, BLOCK_STATUS, 0, 0, 512, SIZE) == EINVAL
    assert refuse(READ_ONLY, BLOCK_STATUS, 0, 0, 512, SIZE) == 0


@given(
    command=st.integers(0, 0xFFFF) | st.integers(0, 8),
    flags=st.integers(0, 0xFFFF) | st.sampled_from([0, FUA]),
    offset=st.integers(0, 2**64 - 1) | st.integers(0, SIZE),
    length=st.integers(0, 2**32 - 1) | st.integers(0, MIB),
)
def test_whatever_is_not_refused_is_inside_the_export(command: int, flags: int, offset: int, length: int) -> None:
    for rules in (PLAIN, STRUCTURED, WITH_CONTEXT, READ_ONLY):
        error = refuse(rules, command, flags, offset, length, SIZE)
        assert error in (0, EPERM, EINVAL, ENOSPC)
        if error == 0 and command not in (FLUSH, DISC):
            assert command in WITH_RANGE
            assert offset + length <= SIZE
            assert rules is not READ_ONLY or command in (READ, CACHE, BLOCK_STATUS)


# Errors ---------------------------------------------------------------------------------------------------

TOLD = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
}


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_an_os_error_is_told_in_the_protocols_words_or_as_eio(number: int) -> None:
    assert errno_of(number) == TOLD.get(number, EIO)
    assert errno_of(OSError(number, "of the disk below")) == TOLD.get(number, EIO)


def test_an_os_error_without_a_number_is_eio() -> None:
    assert errno_of(OSError("no number")) == EIO


# Replies --------------------------------------------------------------------------------------------------

COOKIE = 0x0123456789ABCDEF


@pytest.mark.parametrize(
    ("reply", "golden"),
    [
        pytest.param(simple_reply(0, COOKIE), "67446698 00000000 0123456789abcdef", id="simple success"),
        pytest.param(simple_reply(28, COOKIE), "67446698 0000001c 0123456789abcdef", id="simple error"),
        pytest.param(none_chunk(COOKIE), "668e33ef 0001 0000 0123456789abcdef 00000000", id="none"),
        pytest.param(
            data_chunk_header(COOKIE, 1 << 32, 4096, False),
            "668e33ef 0000 0001 0123456789abcdef 00001008 0000000100000000",
            id="data, more to come",
        ),
        pytest.param(
            data_chunk_header(COOKIE, 0, 64 * MIB, True),
            "668e33ef 0001 0001 0123456789abcdef 04000008 0000000000000000",
            id="data, the last",
        ),
        pytest.param(
            hole_chunk(COOKIE, 1 << 32, 4096, False),
            "668e33ef 0000 0002 0123456789abcdef 0000000c 0000000100000000 00001000",
            id="hole, more to come",
        ),
        pytest.param(
            hole_chunk(COOKIE, 512, 1, True),
            "668e33ef 0001 0002 0123456789abcdef 0000000c 0000000000000200 00000001",
            id="hole, the last",
        ),
        pytest.param(
            block_status_chunk(COOKIE, 2, np.array([(4096, 0), (0xFFFFFE00, 3)]), False),
            "668e33ef 0000 0005 0123456789abcdef 00000014 00000002 00001000 00000000 fffffe00 00000003",
            id="status, more to come",
        ),
        pytest.param(
            block_status_chunk(COOKIE, 1, np.array([(512, 2)]), True),
            "668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 00000200 00000002",
            id="status, the last",
        ),
        pytest.param(error_chunk(COOKIE, 5), "668e33ef 0001 8001 0123456789abcdef 00000006 00000005 0000", id="error"),
        pytest.param(
            error_chunk(COOKIE, 28, "full"),
            "668e33ef 0001 8001 0123456789abcdef 0000000a 0000001c 0004 66756c6c",
            id="error with text",
        ),
    ],
)
def test_a_reply_has_the_protocols_bytes(reply: bytes, golden: str) -> None:
    assert reply == bytes.fromhex(golden)


@given(text=st.text(st.characters()) | st.text(st.characters()).map(lambda text: text * 5000))
def test_error_text_stays_utf_8_of_at_most_4096_bytes(text: str) -> None:
    chunk = error_chunk(COOKIE, 5, text)
    length = int.from_bytes(chunk[24:26], "big")
    assert int.from_bytes(chunk[16:20], "big") == 6 + length == len(chunk) - 20
    assert length <= 4096
    assert text.encode(errors="replace").decode().startswith(chunk[26:].decode())
    assert length > 4092 or chunk[26:] == text.encode(errors="replace")


def test_error_text_with_an_undecodable_file_name_does_not_raise() -> None:
    assert error_chunk(COOKIE, 5, b"/data/\xff".decode("utf-8", "surrogateescape"))[26:] == b"/data/?"

"""The handshake, byte for byte: what the client sends is built here by hand, what it gets is taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import pack, unpack, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdthin.wire.handshake import ExportInfo, Handshake, HandshakeState, Negotiated

GIB = 1 << 30
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 4, 5, 6, 7, 8
LIST_META, SET_META, EXTENDED_HEADERS = 9, 10, 11
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, INVALID, UNKNOWN = 0x80000001, 0x80000003, 0x80000006
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
BOTH_FLAGS = pack(">I", 3)


@dataclass
class Catalogue:
    """Real exports for a handshake; what `server.py` does with a pool, this does with a list."""

    exports: list[ExportInfo] = field(
        default_factory=lambda: [
            ExportInfo("web", 10 * GIB, read_only=False, description="the shop"),
            ExportInfo("web@1", 10 * GIB, read_only=True),
        ]
    )

    def names(self) -> Iterable[tuple[str, str]]:
        return ((export.name, export.description) for export in self.exports)

    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in self.exports if export.name == (name or "web")), None)


# The client's bytes ---------------------------------------------------------------------------------------


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return pack(">I", len(raw)) + raw


def info_data(name: str | bytes, requests: Sequence[int] = ()) -> bytes:
    return string(name) + pack(f">H{len(requests)}H", len(requests), *requests)


def meta_data(name: str | bytes, *queries: str | bytes) -> bytes:
    return string(name) + pack(">I", len(queries)) + b"".join(map(string, queries))


# The server's bytes ---------------------------------------------------------------------------------------


def opened(flags: bytes = BOTH_FLAGS, exports: Catalogue | None = None) -> Handshake:
    handshake = Handshake(exports or Catalogue())
    handshake.receive(flags)
    assert handshake.step() == b""
    assert handshake.state is HandshakeState.OPEN
    return handshake


def send(handshake: Handshake, data: bytes) -> bytes:
    handshake.receive(data)
    replies = []
    while (reply := handshake.step()) is not None:
        replies.append(reply)
    return b"".join(replies)


def replies_of(stream: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply, data) of each option reply in `stream`."""
    replies = []
    while stream:
        magic, number, reply, length = unpack_from(">QIII", stream)
        assert magic == 0x0003E889045565A9
        replies.append((number, reply, stream[20 : 20 + length]))
        assert len(replies[-1][2]) == length
        stream = stream[20 + length :]
    return replies


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """(reply, data) of each reply to one option."""
    replies = replies_of(send(handshake, option(number, data)))
    assert {answered for answered, _, _ in replies} == {number}
    return [(reply, payload) for _, reply, payload in replies]


def assert_refused(replies: list[tuple[int, bytes]], error: int) -> None:
    assert [reply for reply, _ in replies] == [error]
    text = replies[0][1].decode()
    assert text.endswith(".\n"), "nbd-client chops the last byte of what it prints"
    assert text[:-1].isprintable()


def assert_open(handshake: Handshake) -> None:
    """Framing was kept: the next option is found and answered."""
    assert handshake.state is HandshakeState.OPEN
    assert [reply for reply, _ in ask(handshake, LIST)] == [SERVER, SERVER, ACK]


def assert_failed(handshake: Handshake) -> None:
    assert handshake.state is HandshakeState.FAILED
    assert handshake.reason
    assert send(handshake, option(LIST)) == b""


# Greeting and client flags --------------------------------------------------------------------------------


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert Handshake(Catalogue()).greeting() == b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"


@pytest.mark.parametrize("bit", range(2, 32))
def test_a_client_flag_that_was_not_offered_closes_the_connection(bit: int) -> None:
    handshake = Handshake(Catalogue())
    assert send(handshake, pack(">I", 1 << bit | 3)) == b""
    assert_failed(handshake)


@pytest.mark.parametrize("flags", [0, 2])
@pytest.mark.parametrize("number", [ABORT, LIST, INFO, GO, STRUCTURED_REPLY, 99])
def test_a_client_without_fixed_newstyle_may_only_name_an_export(flags: int, number: int) -> None:
    handshake = opened(pack(">I", flags))
    assert send(handshake, option(number)) == b""
    assert_failed(handshake)


def test_a_wrong_option_magic_closes_the_connection() -> None:
    handshake = opened()
    assert send(handshake, b"IHAVEOPS" + pack(">II", LIST, 0)) == b""
    assert_failed(handshake)


# EXPORT_NAME ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_export_name_is_padded_unless_the_client_declined(flags: int) -> None:
    handshake = opened(pack(">I", flags))
    reply = send(handshake, option(EXPORT_NAME, b"web"))
    assert reply == pack(">QH", 10 * GIB, 0x0D6D) + (b"" if flags & 2 else bytes(124))
    assert handshake.state is HandshakeState.DONE
    assert handshake.result == Negotiated(Catalogue().exports[0], 0x0D6D, False, ())


@pytest.mark.parametrize("name", [b"nothing", b"x" * 4096, b"x" * 4097, b"\xff", b"web\0"])
def test_export_name_that_cannot_be_served_closes_the_connection(name: bytes) -> None:
    handshake = opened()
    assert send(handshake, option(EXPORT_NAME, name)) == b""
    assert_failed(handshake)


def test_export_name_after_structured_replies_and_contexts_keeps_both() -> None:
    handshake = opened()
    ask(handshake, STRUCTURED_REPLY)
    ask(handshake, SET_META, meta_data("web", BASE))
    assert send(handshake, option(EXPORT_NAME, b"web")) == pack(">QH", 10 * GIB, 0x0DED)
    assert handshake.result.structured
    assert [name for _, name in handshake.result.contexts] == [BASE]


# INFO and GO ----------------------------------------------------------------------------------------------

BLOCK_SIZE_INFO = pack(">HIII", 3, 1, 4096, 64 << 20)


@pytest.mark.parametrize(
    ("name", "structured", "flags"),
    [
        ("web", False, 0x0D6D),
        ("web", True, 0x0DED),
        ("web@1", False, 0x050F),
        ("web@1", True, 0x058F),
    ],
)
def test_go_tells_size_flags_and_block_sizes_unasked(name: str, structured: bool, flags: int) -> None:
    handshake = opened()
    if structured:
        assert ask(handshake, STRUCTURED_REPLY) == [(ACK, b"")]
    assert ask(handshake, GO, info_data(name)) == [
        (REP_INFO, pack(">HQH", 0, 10 * GIB, flags)),
        (REP_INFO, BLOCK_SIZE_INFO),
        (ACK, b""),
    ]
    assert handshake.state is HandshakeState.DONE
    assert handshake.result.flags == flags
    assert handshake.result.structured is structured


def test_name_and_description_are_told_when_asked_and_unknown_or_repeated_requests_are_ignored() -> None:
    replies = ask(opened(), INFO, info_data("", [2, 1, 1, 2, 3, 0, 77, 0xFFFF]))
    assert replies == [
        (REP_INFO, pack(">HQH", 0, 10 * GIB, 0x0D6D)),
        (REP_INFO, b"\x00\x01web"),
        (REP_INFO, b"\x00\x02the shop"),
        (REP_INFO, BLOCK_SIZE_INFO),
        (ACK, b""),
    ]


def test_an_export_without_a_description_tells_none() -> None:
    replies = ask(opened(), INFO, info_data("web@1", [2]))
    assert [unpack(">H", data[:2])[0] for reply, data in replies if reply == REP_INFO] == [0, 3]


@pytest.mark.parametrize("requests", [[], [1], [2, 3], [0, 1, 2, 3]])
def test_info_and_then_go_tell_the_same(requests: list[int]) -> None:
    handshake = opened()
    told = ask(handshake, INFO, info_data("web", requests))
    assert handshake.state is HandshakeState.OPEN
    assert ask(handshake, GO, info_data("web", requests)) == told


def test_go_is_never_padded() -> None:
    handshake = opened(pack(">I", 1))
    assert [reply for reply, _ in ask(handshake, GO, info_data("web"))] == [REP_INFO, REP_INFO, ACK]


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0\0\0", id="half a name length"),
        pytest.param(string("web"), id="no request count"),
        pytest.param(string("web") + b"\0", id="half a request count"),
        pytest.param(string("web") + pack(">H", 1), id="a request promised, none there"),
        pytest.param(string("web") + pack(">HH", 0, 3), id="a request too many"),
        pytest.param(info_data("web") + b"\0", id="a byte too many"),
        pytest.param(pack(">I", 0xFFFFFFFF) + b"web\0\0", id="a name of 4 GiB"),
        pytest.param(pack(">I", 5) + b"web\0\0", id="a name that swallows the count"),
        pytest.param(info_data(b"\xff\xfe"), id="not UTF-8"),
        pytest.param(info_data(b"web\0"), id="a NUL"),
        pytest.param(info_data(b"x" * 4097), id="4097 bytes of name"),
    ],
)
def test_inconsistent_info_is_invalid_and_the_next_option_is_found(number: int, data: bytes) -> None:
    handshake = opened()
    assert_refused(ask(handshake, number, data), INVALID)
    assert_open(handshake)


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("name", ["nothing", "WEB", "x" * 4096, "\u00e9" * 2048])
def test_an_unknown_export_is_unknown_up_to_the_longest_name(number: int, name: str) -> None:
    handshake = opened()
    assert_refused(ask(handshake, number, info_data(name)), UNKNOWN)
    assert_open(handshake)


# LIST -----------------------------------------------------------------------------------------------------


def test_list_sends_one_reply_per_export_with_its_description() -> None:
    assert ask(opened(), LIST) == [
        (SERVER, string("web") + b"the shop"),
        (SERVER, string("web@1")),
        (ACK, b""),
    ]


def test_listing_nothing_is_an_ack() -> None:
    assert ask(opened(exports=Catalogue([])), LIST) == [(ACK, b"")]


def test_a_hundred_thousand_exports_are_listed() -> None:
    exports = Catalogue([ExportInfo(f"volume-{number:06}", 512, False) for number in range(100_000)])
    reply = send(opened(exports=exports), option(LIST))
    assert len(reply) == 100_000 * (20 + 4 + 13) + 20
    assert reply[-20:] == pack(">QIII", 0x0003E889045565A9, LIST, ACK, 0)


# Options with nothing to say ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [LIST, STARTTLS, STRUCTURED_REPLY])
@pytest.mark.parametrize("size", [1, 16, 4097])
def test_data_where_none_belongs_is_invalid_and_consumed(number: int, size: int) -> None:
    handshake = opened()
    assert_refused(ask(handshake, number, b"I" * size), INVALID)
    assert_open(handshake)


def test_tls_is_not_offered() -> None:
    handshake = opened()
    assert_refused(ask(handshake, STARTTLS), UNSUP)
    assert_open(handshake)


@pytest.mark.parametrize("number", [0, PEEK_EXPORT, EXTENDED_HEADERS, 12, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 1, 256 * 1024])
def test_an_unknown_option_is_unsupported_and_its_data_is_drained(number: int, size: int) -> None:
    handshake = opened()
    assert_refused(ask(handshake, number, bytes(size)), UNSUP)
    assert_open(handshake)


def test_structured_replies_may_be_asked_for_twice() -> None:
    handshake = opened()
    assert ask(handshake, STRUCTURED_REPLY) == [(ACK, b"")]
    assert ask(handshake, STRUCTURED_REPLY) == [(ACK, b"")]
    assert_open(handshake)


def test_structured_replies_refused_for_their_data_are_not_agreed() -> None:
    handshake = opened()
    ask(handshake, STRUCTURED_REPLY, b"x")
    ask(handshake, GO, info_data("web"))
    assert not handshake.result.structured


@pytest.mark.parametrize("data", [b"", b"whatever"])
def test_abort_is_acknowledged_whatever_its_data(data: bytes) -> None:
    handshake = opened()
    assert ask(handshake, ABORT, data) == [(ACK, b"")]
    assert handshake.state is HandshakeState.ABORTED
    assert send(handshake, option(LIST)) == b""


# Metadata contexts ----------------------------------------------------------------------------------------


def structured() -> Handshake:
    handshake = opened()
    assert ask(handshake, STRUCTURED_REPLY) == [(ACK, b"")]
    return handshake


def names_of(replies: list[tuple[int, bytes]]) -> list[str]:
    assert [reply for reply, _ in replies] == [META] * (len(replies) - 1) + [ACK]
    return [data[4:].decode() for reply, data in replies if reply == META]


def selected_after_go(handshake: Handshake, name: str = "web") -> list[str]:
    assert ask(handshake, GO, info_data(name))[-1] == (ACK, b"")
    return [context for _, context in handshake.result.contexts]


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], [BASE, DEPTH]),
        (["base:"], [BASE]),
        (["qemu:"], [DEPTH]),
        (["qemu:", "base:"], [BASE, DEPTH]),
        ([BASE, BASE, "base:"], [BASE]),
        ([DEPTH], [DEPTH]),
        (["base:unheard-of", "x-other:", "x-other:thing", "qemu:dirty-bitmap:b0", "", ":", "base"], []),
    ],
)
def test_contexts_are_listed_by_name_and_by_namespace(queries: list[str], listed: list[str]) -> None:
    for handshake in (opened(), structured()):
        replies = ask(handshake, LIST_META, meta_data("web", *queries))
        assert names_of(replies) == listed
        assert all(data[:4] == bytes(4) for reply, data in replies if reply == META)


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        (["base:"], []),
        (["qemu:"], []),
        ([BASE], [BASE]),
        ([DEPTH], [DEPTH]),
        ([DEPTH, BASE], [BASE, DEPTH]),
        ([BASE, BASE, BASE], [BASE]),
        (["base:unheard-of", "x-other:thing", "", BASE], [BASE]),
        (["x" * 4096, BASE], [BASE]),
    ],
)
def test_contexts_are_selected_by_name_only_and_once(queries: list[str], selected: list[str]) -> None:
    handshake = structured()
    replies = ask(handshake, SET_META, meta_data("web", *queries))
    assert names_of(replies) == selected
    identities = [unpack(">I", data[:4])[0] for reply, data in replies if reply == META]
    assert len(set(identities)) == len(identities)
    assert selected_after_go(handshake) == selected
    assert handshake.result.contexts == tuple(zip(identities, selected, strict=True))


def test_selecting_contexts_before_structured_replies_is_invalid() -> None:
    handshake = opened()
    assert_refused(ask(handshake, SET_META, meta_data("web", BASE)), INVALID)
    assert_open(handshake)


@pytest.mark.parametrize("number", [LIST_META, SET_META])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(string("web"), id="no query count"),
        pytest.param(string("web") + pack(">I", 1), id="a query promised, none there"),
        pytest.param(string("web") + pack(">I", 0xFFFFFFFF), id="four billion queries"),
        pytest.param(string("web") + pack(">II", 1, 0xFFFFFFFF) + b"base:", id="a query of 4 GiB"),
        pytest.param(string("web") + pack(">II", 1, 6) + b"base:", id="a query cut short"),
        pytest.param(meta_data("web", BASE) + b"\0", id="a byte too many"),
        pytest.param(meta_data(b"x" * 4097, BASE), id="4097 bytes of name"),
        pytest.param(meta_data("web", b"x" * 4097), id="4097 bytes of query"),
        pytest.param(meta_data(b"\xff", BASE), id="a name that is not UTF-8"),
        pytest.param(meta_data("web", b"\xff"), id="a query that is not UTF-8"),
        pytest.param(meta_data("web", b"base:\0"), id="a NUL"),
    ],
)
def test_inconsistent_queries_are_invalid_and_undo_the_selection(number: int, data: bytes) -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    assert_refused(ask(handshake, number, data), INVALID)
    assert_open(handshake)
    assert selected_after_go(handshake) == ([] if number == SET_META else [BASE])


def test_a_later_selection_replaces_the_earlier() -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    ask(handshake, SET_META, meta_data("web", DEPTH))
    assert selected_after_go(handshake) == [DEPTH]


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_contexts_of_an_unknown_export_are_unknown_and_only_set_undoes_the_selection(number: int) -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    assert_refused(ask(handshake, number, meta_data("x" * 4096, BASE)), UNKNOWN)
    assert selected_after_go(handshake) == ([] if number == SET_META else [BASE])


def test_listing_contexts_leaves_the_selection() -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    ask(handshake, LIST_META, meta_data("web@1", DEPTH))
    assert selected_after_go(handshake) == [BASE]


def test_contexts_count_only_for_the_export_they_were_selected_for() -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    assert selected_after_go(handshake, "web@1") == []


def test_a_selection_survives_a_look_at_another_export() -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("web", BASE))
    ask(handshake, INFO, info_data("web@1"))
    ask(handshake, GO, info_data("nothing"))
    assert selected_after_go(handshake) == [BASE]


def test_the_default_export_is_the_same_export_by_its_own_name() -> None:
    handshake = structured()
    ask(handshake, SET_META, meta_data("", BASE))
    assert selected_after_go(handshake, "web") == [BASE]


# Limits, shutdown, what comes behind ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [LIST, GO, EXPORT_NAME, 99])
@pytest.mark.parametrize("size", [256 * 1024 + 1, 0xFFFFFFFF])
def test_an_oversize_option_closes_the_connection_before_its_data_comes(number: int, size: int) -> None:
    handshake = opened()
    assert send(handshake, b"IHAVEOPT" + pack(">II", number, size)) == b""
    assert_failed(handshake)


@pytest.mark.parametrize("exports", [0, 1, 50])
def test_options_without_end_close_the_connection(exports: int) -> None:
    catalogue = Catalogue([ExportInfo(str(number), 512, False) for number in range(exports)])
    handshake = opened(exports=catalogue)
    for _ in range(64 + 4 * exports):
        assert_refused(ask(handshake, 99), UNSUP)
    assert send(handshake, option(99)) == b""
    assert_failed(handshake)


def test_a_step_answers_one_option() -> None:
    handshake = opened()
    handshake.receive(option(LIST) + option(99) + option(ABORT))
    answered = []
    while (reply := handshake.step()) is not None:
        answered.append({number for number, _, _ in replies_of(reply)})
    assert answered == [{LIST}, {99}, {ABORT}]


@pytest.mark.parametrize("last", [option(GO, info_data("web")), option(EXPORT_NAME, b"web")])
def test_requests_sent_with_the_last_option_are_handed_over_once(last: bytes) -> None:
    handshake = opened()
    request = bytes.fromhex("25609513") + bytes(24)
    handshake.receive(last + request)
    assert handshake.step()
    assert handshake.step() is None
    handshake.receive(b"more")
    assert handshake.rest() == request + b"more"
    assert handshake.rest() == b""


# Any bytes, in any pieces ---------------------------------------------------------------------------------

_names = st.sampled_from(["", "web", "web@1", "nothing", "x" * 4096, "x" * 4097]) | st.binary(max_size=6)
_queries = st.lists(st.sampled_from([BASE, DEPTH, "base:", "qemu:", "x:y"]) | st.binary(max_size=6), max_size=4)
_data = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(info_data, _names, st.lists(st.integers(0, 4), max_size=5)),
    st.builds(lambda name, queries: meta_data(name, *queries), _names, _queries),
)
_options = st.one_of(
    st.builds(option, st.integers(0, 12), _data),
    st.builds(option, st.just(GO), st.builds(info_data, _names)),
    st.binary(max_size=40),
)
_streams = st.builds(
    lambda flags, options: flags + b"".join(options),
    st.sampled_from([BOTH_FLAGS, pack(">I", 1), pack(">I", 0)]) | st.binary(max_size=4),
    st.lists(_options, max_size=8),
)


def outcome(pieces: Iterable[bytes]) -> tuple[bytes, HandshakeState, str, Negotiated | None, bytes]:
    handshake = Handshake(Catalogue())
    sent = b"".join([send(handshake, piece) for piece in pieces])
    done = handshake.state is HandshakeState.DONE
    return (
        sent,
        handshake.state,
        handshake.reason,
        handshake.result if done else None,
        handshake.rest() if done else b"",
    )


@given(stream=_streams, cuts=st.lists(st.integers(0, 10_000), max_size=6))
def test_any_bytes_in_any_pieces_end_as_they_do_at_once(stream: bytes, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(stream)) for cut in cuts)
    pieces = [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]
    at_once = outcome([stream])
    assert outcome(pieces) == at_once
    _, state, reason, _, rest = at_once
    assert bool(reason) == (state is HandshakeState.FAILED)
    assert stream.endswith(rest)


def test_every_place_to_cut_a_whole_handshake_gives_the_same() -> None:
    stream = BOTH_FLAGS + b"".join(
        [
            option(STARTTLS),
            option(STRUCTURED_REPLY),
            option(99, b"drained"),
            option(LIST),
            option(SET_META, meta_data("web", BASE, DEPTH)),
            option(GO, info_data("web", [1, 2, 3])),
            b"the first request",
        ]
    )
    at_once = outcome([stream])
    assert at_once[1] is HandshakeState.DONE
    assert at_once[4] == b"the first request"
    for cut in range(len(stream) + 1):
        assert outcome([stream[:cut], stream[cut:]]) == at_once
    assert outcome([stream[place : place + 1] for place in range(len(stream))]) == at_once

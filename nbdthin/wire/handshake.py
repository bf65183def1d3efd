"""The handshake of fixed newstyle NBD, from the greeting to the first request, without a socket.

    OPEN ── GO, EXPORT_NAME ──> DONE      `result` says what was agreed; `rest()` is what came in behind it
      ├──── ABORT ────────────> ABORTED   send the reply, then close; the peer may be gone already
      └──── violation ────────> FAILED    close at once; `reason` is for the log, nothing can be sent

A violation is what has no answer in the protocol: a flag that was not offered, a wrong magic number, an
EXPORT_NAME that cannot be served, an option too long, options without end. Everything else that is wrong is
answered with an error, and the option's data is always consumed first, so the next option is found.

Whoever owns the connection feeds `receive`, calls `step` until it answers None, and sends the answers in
order. An option a step: a client that sends many LISTs at once meets the owner's flow control between them.
This module does not time clients out, and opens nothing: `Exports.find` only describes an export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from nbdthin.units import KiB
from nbdthin.wire import proto
from nbdthin.wire.proto import HandshakeFlag, Info, Option, Reply, TransmissionFlag

MAX_OPTION = 256 * KiB
"""Bytes of data in one option: a name and sixty metadata queries, each as long as a string may be."""

FREE_OPTIONS = 64
"""Options a client may send whatever is exported; what it needs to agree on one export is about five."""

OPTIONS_PER_EXPORT = 4
"""More options for each export: `qemu-nbd --list` asks two about every export of the list."""

OFFERED_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

CONTEXTS = ((1, proto.BASE_ALLOCATION), (2, proto.ALLOCATION_DEPTH))
"""The metadata contexts of every export, with the ids that BLOCK_STATUS replies carry."""

_ALWAYS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
_WRITABLE = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


@dataclass(frozen=True, slots=True)
class ExportInfo:
    name: str
    size: int
    read_only: bool
    description: str = ""
    trims: bool = True  # space can be given back
    lasting: bool = False  # asked for by the name that is only its own: the client means to come back


class Exports(Protocol):
    """What is exported. Names and descriptions are at most MAX_STRING bytes of UTF-8 without NUL."""

    def names(self) -> Iterable[tuple[str, str]]:
        """(name, description) of each export."""

    def find(self, name: str) -> ExportInfo | None:
        """The export a client means by `name`; the default one for the empty name, if there is a default."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What both sides agreed on, for as long as the connection lasts."""

    export: ExportInfo
    flags: int  # of TransmissionFlag, plain for the hot path
    structured: bool
    contexts: tuple[tuple[int, str], ...]  # (id, name), selected for this export


class HandshakeState(Enum):
    OPEN = auto()
    DONE = auto()
    ABORTED = auto()
    FAILED = auto()


class Handshake:
    def __init__(self, exports: Exports) -> None:
        self.state = HandshakeState.OPEN
        self.reason = ""  # why the state is FAILED
        self._exports = exports
        self._buffer = bytearray()  # received and not yet handled; deleting its front is no copy in CPython
        self._client_flags: int | None = None  # None until they came
        self._options = 0  # seen so far
        self._option_limit = FREE_OPTIONS
        self._structured = False
        self._selected_for = ""  # the export that SET_META_CONTEXT named
        self._selected: tuple[tuple[int, str], ...] = ()
        self._result: Negotiated | None = None

    @property
    def result(self) -> Negotiated:
        """Only once the state is DONE."""
        assert self._result is not None
        return self._result

    def greeting(self) -> bytes:
        return proto.GREETING.pack(proto.NBDMAGIC, proto.IHAVEOPT, OFFERED_FLAGS)

    def receive(self, data: bytes | memoryview) -> None:
        """Take `data`, which is copied. Call `step` until it answers None."""
        self._buffer += data

    def rest(self) -> bytes:
        """The bytes behind a handshake that is DONE: the first requests. They are handed out once."""
        assert self.state is HandshakeState.DONE
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def step(self) -> bytes | None:
        """Handle the client flags or one option: its reply, perhaps empty. None: nothing to handle yet, or ever."""
        if self.state is not HandshakeState.OPEN:
            return None
        try:
            if self._client_flags is None:
                return self._step_client_flags()
            return self._step_option()
        except _Violation as violation:
            self.state = HandshakeState.FAILED
            self.reason = str(violation)
            return b""

    # Framing ----------------------------------------------------------------------------------------------

    def _step_client_flags(self) -> bytes | None:
        if len(self._buffer) < proto.CLIENT_FLAGS.size:
            return None
        (flags,) = proto.CLIENT_FLAGS.unpack(self._take(proto.CLIENT_FLAGS.size))
        if flags & ~OFFERED_FLAGS:
            raise _Violation(f"client flags {flags:#x} have bits that were not offered")
        self._client_flags = flags
        return b""

    def _step_option(self) -> bytes | None:
        if len(self._buffer) < proto.OPTION.size:
            return None
        magic, option, length = proto.OPTION.unpack_from(self._buffer)
        if magic != proto.IHAVEOPT:
            raise _Violation(f"option with magic number {magic:#x}")
        if length > MAX_OPTION:
            raise _Violation(f"option {option} with {length} bytes of data")
        if len(self._buffer) < proto.OPTION.size + length:
            return None
        data = self._take(proto.OPTION.size + length)[proto.OPTION.size :]
        self._count_option()
        try:
            return self._answer(option, data)
        except _Refusal as refusal:
            if option == Option.EXPORT_NAME:  # its reply has no place for an error
                raise _Violation(f"EXPORT_NAME: {refusal.text}") from refusal
            return _reply(option, refusal.reply, _error_text(refusal.text))

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _count_option(self) -> None:
        # The exports are counted only when the limit is reached: there may be a hundred thousand of them.
        self._options += 1
        if self._options > self._option_limit:
            self._option_limit = FREE_OPTIONS + OPTIONS_PER_EXPORT * sum(1 for _ in self._exports.names())
            if self._options > self._option_limit:
                raise _Violation(f"more than {self._option_limit} options")

    # Options ----------------------------------------------------------------------------------------------

    def _answer(self, option: int, data: bytes) -> bytes:
        if not self._agreed(HandshakeFlag.FIXED_NEWSTYLE) and option != Option.EXPORT_NAME:
            raise _Violation(f"option {option} from a client without fixed newstyle, which knows no replies")
        match option:
            case Option.EXPORT_NAME:
                return self._export_name(data)
            case Option.ABORT:
                self.state = HandshakeState.ABORTED
                return _reply(option, Reply.ACK)
            case Option.LIST:
                return self._list(data)
            case Option.INFO | Option.GO:
                return self._info_or_go(option, data)
            case Option.STRUCTURED_REPLY:
                return self._structured_reply(data)
            case Option.LIST_META_CONTEXT:
                return self._list_meta_context(data)
            case Option.SET_META_CONTEXT:
                return self._set_meta_context(data)
            case Option.STARTTLS:
                _refuse_data(data)
                raise _Refusal(Reply.ERR_UNSUP, "This server has no TLS.")
            case _:
                raise _Refusal(Reply.ERR_UNSUP, "This server does not know the option.")

    def _export_name(self, data: bytes) -> bytes:
        export = self._find(_string(data))
        self._finish(export)
        zeroes = b"" if self._agreed(HandshakeFlag.NO_ZEROES) else proto.EXPORT_NAME_ZEROES
        return proto.EXPORT_NAME_REPLY.pack(export.size, self._transmission_flags(export)) + zeroes

    def _list(self, data: bytes) -> bytes:
        _refuse_data(data)
        replies = [
            _reply(Option.LIST, Reply.SERVER, proto.counted(name) + description.encode())
            for name, description in self._exports.names()
        ]
        replies.append(_reply(Option.LIST, Reply.ACK))
        return b"".join(replies)

    def _info_or_go(self, option: int, data: bytes) -> bytes:
        fields = _Fields(data)
        name = fields.string()
        requested = {fields.number(2) for _ in range(fields.number(2))}
        fields.end()
        export = self._find(name)
        replies = [_reply(option, Reply.INFO, info) for info in self._infos(export, requested)]
        replies.append(_reply(option, Reply.ACK))
        if option == Option.GO:
            self._finish(export)
        return b"".join(replies)

    def _infos(self, export: ExportInfo, requested: set[int]) -> Iterator[bytes]:
        yield proto.INFO_EXPORT.pack(Info.EXPORT, export.size, self._transmission_flags(export))
        if Info.NAME in requested:
            yield proto.INFO_STRING.pack(Info.NAME) + export.name.encode()
        if Info.DESCRIPTION in requested and export.description:
            yield proto.INFO_STRING.pack(Info.DESCRIPTION) + export.description.encode()
        # Unasked as well: without it a client must assume that 32 MiB is all a request may carry.
        yield proto.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, proto.MIN_BLOCK, proto.PREFERRED_BLOCK, proto.MAX_PAYLOAD)

    def _structured_reply(self, data: bytes) -> bytes:
        _refuse_data(data)
        self._structured = True
        return _reply(Option.STRUCTURED_REPLY, Reply.ACK)

    def _list_meta_context(self, data: bytes) -> bytes:
        _, queries = self._read_meta_context(data)
        listed = [name for _, name in CONTEXTS if not queries or _lists(queries, name)]
        return _meta_context_replies(Option.LIST_META_CONTEXT, [(0, name) for name in listed])

    def _set_meta_context(self, data: bytes) -> bytes:
        self._selected = ()  # what was selected before is gone even when this option fails
        if not self._structured:
            raise _Refusal(Reply.ERR_INVALID, "Ask for structured replies before metadata contexts.")
        export, queries = self._read_meta_context(data)
        self._selected_for = export.name
        self._selected = tuple(context for context in CONTEXTS if context[1] in queries)
        return _meta_context_replies(Option.SET_META_CONTEXT, self._selected)

    def _read_meta_context(self, data: bytes) -> tuple[ExportInfo, set[str]]:
        fields = _Fields(data)
        name = fields.string()
        queries = {fields.string() for _ in range(fields.number(4))}
        fields.end()
        return self._find(name), queries

    # What they share --------------------------------------------------------------------------------------

    def _agreed(self, flag: HandshakeFlag) -> bool:
        return self._client_flags is not None and bool(self._client_flags & flag)

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            raise _Refusal(Reply.ERR_UNKNOWN, "No export has this name.")
        return export

    def _transmission_flags(self, export: ExportInfo) -> int:
        flags = _ALWAYS | (TransmissionFlag.READ_ONLY if export.read_only else _WRITABLE)
        if not export.trims:
            flags &= ~TransmissionFlag.SEND_TRIM
        return int(flags | TransmissionFlag.SEND_DF if self._structured else flags)

    def _finish(self, export: ExportInfo) -> None:
        contexts = self._selected if self._selected_for == export.name else ()
        self._result = Negotiated(export, self._transmission_flags(export), self._structured, contexts)
        self.state = HandshakeState.DONE


class _Refusal(Exception):
    """The option is answered with an error, and the handshake goes on."""

    def __init__(self, reply: Reply, text: str) -> None:
        super().__init__(reply, text)
        self.reply = reply
        self.text = text  # a sentence


class _Violation(Exception):
    """Nothing the client could be told: the connection is closed."""


class _Fields:
    """An option's data, field by field. No length is believed before it is compared with what is there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def string(self) -> str:
        return _string(self._take(self.number(4)))

    def end(self) -> None:
        if self._position != len(self._data):
            raise _Refusal(Reply.ERR_INVALID, "The option has more data than its lengths say.")

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise _Refusal(Reply.ERR_INVALID, "The option has less data than its lengths say.")
        taken = self._data[self._position : end]
        self._position = end
        return taken


def _string(raw: bytes) -> str:
    if len(raw) > proto.MAX_STRING:
        raise _Refusal(Reply.ERR_INVALID, f"A string is longer than {proto.MAX_STRING} bytes.")
    if b"\0" in raw:
        raise _Refusal(Reply.ERR_INVALID, "A string has a NUL in it.")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _Refusal(Reply.ERR_INVALID, "A string is not UTF-8.") from None


def _refuse_data(data: bytes) -> None:
    if data:
        raise _Refusal(Reply.ERR_INVALID, "The option takes no data.")


def _lists(queries: set[str], context: str) -> bool:
    """A namespace alone (`base:`, `qemu:`) lists what is in it; in SET_META_CONTEXT it selects nothing."""
    namespace, colon, _ = context.partition(":")
    return context in queries or namespace + colon in queries


def _meta_context_replies(option: Option, contexts: Iterable[tuple[int, str]]) -> bytes:
    replies = [
        _reply(option, Reply.META_CONTEXT, proto.META_CONTEXT.pack(identity) + name.encode())
        for identity, name in contexts
    ]
    replies.append(_reply(option, Reply.ACK))
    return b"".join(replies)


def _error_text(sentence: str) -> bytes:
    # nbd-client chops the last byte before it prints the text: let that be the newline.
    return f"{sentence}\n".encode()


def _reply(option: int, reply: Reply, data: bytes = b"") -> bytes:
    return proto.OPTION_REPLY.pack(proto.OPTION_REPLY_MAGIC, option, reply, len(data)) + data

"""Requests and replies after the handshake: which request is refused with what, and the bytes of every reply.

COMMANDS is the truth about legality, one row a command, to be read beside the protocol. `legality` folds it
with what was negotiated into plain integers, once a connection, and `refuse` reads only those: an IntFlag
test costs microseconds, and `refuse` is called for every request.

Refusing is all that happens here. Consuming a refused WRITE's payload is the receiver's, and so is closing,
for which there are two reasons: a wrong magic number and a WRITE of more than MAX_PAYLOAD. Whatever else a
request asks for, it gets its error and the connection goes on.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdthin.wire import proto
from nbdthin.wire.handshake import Negotiated
from nbdthin.wire.proto import Chunk, ChunkFlag, Command, CommandFlag, Errno, TransmissionFlag

# Legality -------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What one command may ask for."""

    beyond_end: Errno | None  # the error where the range passes the end; None: offset and length mean nothing
    flags: CommandFlag = CommandFlag(0)  # allowed besides FUA, which every command takes
    writes: bool = False  # EPERM on a read-only export
    carries_data: bool = False  # with the request or the reply: the length is limited to MAX_PAYLOAD
    asks_context: bool = False  # EINVAL where no metadata context was selected
    may_be_empty: bool = True  # whether length 0 succeeds
    advertised_by: TransmissionFlag | None = None  # EINVAL where the server did not


# DISC is missing: it has no reply, so there is nothing to refuse it with.
COMMANDS: Final[dict[Command, Rule]] = {
    Command.READ: Rule(Errno.EINVAL, CommandFlag.DF, carries_data=True),
    Command.WRITE: Rule(Errno.ENOSPC, writes=True, carries_data=True),
    # Offset and length of a FLUSH should be 0. Where they are not, failing a client's fsync for it would harm
    # more than ignoring it, which is what qemu-nbd and nbd-server do.
    Command.FLUSH: Rule(None),
    # Old kernels cut the length of a large discard to 32 bits, which may leave 0.
    Command.TRIM: Rule(Errno.EINVAL, writes=True, advertised_by=TransmissionFlag.SEND_TRIM),
    Command.CACHE: Rule(Errno.EINVAL),
    Command.WRITE_ZEROES: Rule(Errno.ENOSPC, CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO, writes=True),
    # A status chunk has at least one extent of at least one byte: length 0 has no answer but an error.
    Command.BLOCK_STATUS: Rule(Errno.EINVAL, CommandFlag.REQ_ONE, asks_context=True, may_be_empty=False),
}

ADVERTISED_BY: Final[dict[CommandFlag, TransmissionFlag]] = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}
"""Command flags that are undocumented, hence refused, unless the server advertised them."""

Rules: TypeAlias = dict[int, tuple[int, int, int, int, int]]
"""By command: (error of every such request or 0, forbidden flags, shortest length, longest length, error beyond
the end). Plain tuples: Python 3.11 takes twice as long to unpack a NamedTuple.
"""

_EINVAL: Final = int(Errno.EINVAL)
_LONGEST: Final = 0xFFFFFFFF
_UNKNOWN: Final = (_EINVAL, 0, 0, 0, 0)
_NEVER_REFUSED: Final = (0, 0, 0, _LONGEST, 0)


def legality(negotiated: Negotiated) -> Rules:
    """COMMANDS folded with what this connection negotiated."""
    rules = {int(command): _fold(rule, negotiated) for command, rule in COMMANDS.items()}
    rules[int(Command.DISC)] = _NEVER_REFUSED
    return rules


def plain_lengths(rules: Rules) -> dict[int, int]:
    """By command: the length up to which `refuse` lets READ and WRITE pass without flags, inside the export: for who
    would rather not call it for most requests.
    """
    return {int(command): rules[command][3] for command in (Command.READ, Command.WRITE) if not rules[command][0]}


def _fold(rule: Rule, negotiated: Negotiated) -> tuple[int, int, int, int, int]:
    always = 0
    if rule.writes and negotiated.flags & TransmissionFlag.READ_ONLY:
        always = int(Errno.EPERM)
    elif rule.asks_context and not negotiated.contexts:
        always = _EINVAL
    elif rule.advertised_by is not None and not negotiated.flags & rule.advertised_by:
        always = _EINVAL
    allowed = rule.flags | CommandFlag.FUA
    unadvertised = [flag for flag, by in ADVERTISED_BY.items() if not negotiated.flags & by]
    forbidden = 0xFFFF & ~int(allowed) | sum(unadvertised)
    shortest = 0 if rule.may_be_empty else 1
    longest = proto.MAX_PAYLOAD if rule.carries_data else _LONGEST
    return always, forbidden, shortest, longest, int(rule.beyond_end or 0)


def refuse(rules: Rules, command: int, flags: int, offset: int, length: int, size: int) -> int:
    """The error to answer, 0 where the request is legal. `size` is the export's size now."""
    always, forbidden, shortest, longest, beyond_end = rules.get(command, _UNKNOWN)
    if always:
        return always
    if flags & forbidden or not shortest <= length <= longest:
        return _EINVAL
    if offset + length > size:  # Python's integers do not wrap at 2^64
        return beyond_end
    return 0


# Errors ---------------------------------------------------------------------------------------------------

_BY_OS_ERROR: Final[dict[int | None, Errno]] = {
    errno.EPERM: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.ENOMEM: Errno.ENOMEM,
    errno.EINVAL: Errno.EINVAL,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
}


def errno_of(error: OSError | int) -> int:
    """What a client is told of an error of the storage below; EIO where the protocol has no word for it.

    ENOTSUP, EOVERFLOW and ESHUTDOWN never come out of here: to a client they answer one kind of request each,
    whatever the operating system meant by them. Who means them names the Errno.
    """
    number = error if isinstance(error, int) else error.errno
    return int(_BY_OS_ERROR.get(number, Errno.EIO))


# Replies --------------------------------------------------------------------------------------------------

_DONE: Final = int(ChunkFlag.DONE)
_NONE: Final = int(Chunk.NONE)
_DATA: Final = int(Chunk.OFFSET_DATA)
_HOLE: Final = int(Chunk.OFFSET_HOLE)
_STATUS: Final = int(Chunk.BLOCK_STATUS)
_ERROR: Final = int(Chunk.ERROR)

_pack_simple = proto.SIMPLE_REPLY.pack
_pack_chunk = proto.CHUNK.pack
_pack_data = proto.OFFSET_DATA.pack
_pack_hole = proto.OFFSET_HOLE.pack


def simple_reply(error: int, cookie: int) -> bytes:
    """A whole reply, or the header before a READ's data. Once structured replies are agreed, not for READ."""
    return _pack_simple(proto.SIMPLE_REPLY_MAGIC, error, cookie)


def none_chunk(cookie: int) -> bytes:
    """Success with nothing to say, or nothing more: always the last chunk."""
    return _pack_chunk(proto.STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)


def data_chunk_header(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """What goes before `length` bytes of data, at least 1. `done` only if they are sure to be sent."""
    return _pack_data(proto.STRUCTURED_REPLY_MAGIC, done, _DATA, cookie, 8 + length, offset)


def hole_chunk(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """`length` bytes, at least 1, that read as zero."""
    return _pack_hole(proto.STRUCTURED_REPLY_MAGIC, done, _HOLE, cookie, 12, offset, length)


def block_status_chunk(cookie: int, context: int, extents: npt.NDArray[np.int64], done: bool) -> bytes:
    """`extents` are rows of length and status, from the request's offset on: at least one, none empty."""
    header = proto.BLOCK_STATUS.pack(proto.STRUCTURED_REPLY_MAGIC, done, _STATUS, cookie, 4 + 8 * len(extents), context)
    return header + extents.astype(">u4").tobytes()


def error_chunk(cookie: int, error: int, text: str = "") -> bytes:
    """The last chunk of a request that failed. `text` is for people; it is cut at MAX_STRING bytes."""
    raw = text.encode(errors="replace")[: proto.MAX_STRING].decode(errors="ignore").encode()
    header = proto.ERROR.pack(proto.STRUCTURED_REPLY_MAGIC, _DONE, _ERROR, cookie, 6 + len(raw), error, len(raw))
    return header + raw

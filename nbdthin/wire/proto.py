"""NBD's numbers and layouts, in the words of the protocol document (doc/proto.md of NetworkBlockDevice/nbd).

Every number that crosses the wire has its one definition here; all fields are big-endian. What the numbers
mean is in `handshake.py` and `transmission.py`. TLS, extended headers and resize are left out: this server
offers none of them, and a client that asks is told so.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from nbdthin.units import KiB, MiB

# Limits ---------------------------------------------------------------------------------------------------

MAX_STRING = 4096
"""Bytes of a name, description, query or error text: the protocol's own maximum."""

MAX_PAYLOAD = 64 * MiB
"""Bytes of data in one READ or WRITE. The protocol's own `integrityhuge` test sends 49,865,728."""

MIN_BLOCK = 1
PREFERRED_BLOCK = 4 * KiB

# Handshake ------------------------------------------------------------------------------------------------

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  # IHAVEOPT, option, length of the data that follows
OPTION_REPLY = Struct(">QIII")  # magic, option, reply, length of the data that follows
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags; no option reply around it
EXPORT_NAME_ZEROES = bytes(124)  # follow EXPORT_NAME_REPLY unless NO_ZEROES is agreed
STRING_LENGTH = Struct(">I")  # before a name or a query
INFO_EXPORT = Struct(">HQH")  # Info.EXPORT, size, transmission flags
INFO_STRING = Struct(">H")  # Info.NAME or Info.DESCRIPTION, then the text
INFO_BLOCK_SIZE = Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, largest payload
META_CONTEXT = Struct(">I")  # context id, then the name


def counted(text: str) -> bytes:
    """A name or a query with its STRING_LENGTH."""
    raw = text.encode()
    return STRING_LENGTH.pack(len(raw)) + raw


class HandshakeFlag(IntFlag):
    """The server's and the client's flags have the same bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_INVALID = 1 << 31 | 3
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# Transmission ---------------------------------------------------------------------------------------------

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length; a WRITE's data follows
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie; a READ's data follows where the error is 0
CHUNK = Struct(">IHHQI")  # magic, chunk flags, chunk type, cookie, length of the payload that follows
REPLY_MAGIC = Struct(">I")  # what either reply begins with

# What follows a chunk's header.
DATA_PAYLOAD = Struct(">Q")  # offset; the data follows
HOLE_PAYLOAD = Struct(">QI")  # offset, length of the hole
STATUS_PAYLOAD = Struct(">I")  # context id; STATUS_EXTENTs follow
STATUS_EXTENT = Struct(">II")  # length, status
ERROR_PAYLOAD = Struct(">IH")  # error, length of the text that follows


def _behind_header(payload: Struct) -> Struct:
    return Struct(CHUNK.format + payload.format.removeprefix(">"))


OFFSET_DATA = _behind_header(DATA_PAYLOAD)
OFFSET_HOLE = _behind_header(HOLE_PAYLOAD)
BLOCK_STATUS = _behind_header(STATUS_PAYLOAD)
ERROR = _behind_header(ERROR_PAYLOAD)


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ChunkFlag(IntFlag):
    DONE = 1 << 0


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1


class Errno(IntEnum):
    """The errors a reply may carry. The numbers are Linux's, on every platform."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# Metadata contexts ----------------------------------------------------------------------------------------

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"


class Allocation(IntFlag):
    """Status of an extent in `base:allocation`. Bytes that a snapshot shares are neither: they hold data."""

    HOLE = 1 << 0
    ZERO = 1 << 1

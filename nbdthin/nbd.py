"""An NBD client: volumes, snapshots and anybody else's exports, read and written from Python.

    with nbd.connect(pool.show("web").uri) as disk:
        for extent in disk.extents():                      # what holds data, what reads as zeroes
            ...
        for offset, data in disk.read_many([(0, GiB)]):    # many requests on their way at once
            ...
        with disk.pipelined():                             # the same for what changes
            disk.write(0, b"...")
            disk.zero(65536, MiB)
        disk.flush()

One blocking socket and no thread: to keep the server busy it is enough that the next requests are there before it has
answered the last. That cannot lock up. While data comes in, what goes out are headers of 28 bytes, while data goes out,
what comes in are replies of 20, and either fit into a socket's buffer (`IN_FLIGHT`); so a write first takes in the
reads that are on their way.

`negotiate` ends where the kernel's client begins: with a socket behind its handshake. The protocol's numbers are
wire/proto.py's. TLS is not spoken.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from nbdthin.addresses import NBD_PORT
from nbdthin.errors import Error, Invalid, NoSpace, NotFound, ReadOnly, Unreachable
from nbdthin.pool.rows import Extent
from nbdthin.units import KiB, MiB
from nbdthin.wire import proto
from nbdthin.wire.proto import (
    Allocation,
    Chunk,
    ChunkFlag,
    Command,
    CommandFlag,
    Errno,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

PATIENCE = 30  # seconds that a server may take over an answer of the handshake, and to say goodbye; nothing else ends
IN_FLIGHT = 64  # requests
WINDOW = 8 * MiB  # bytes of the reads or writes in flight
REQUEST = MiB  # bytes of one READ or WRITE
EFFECT = 0xFFFF0000  # bytes of one request without data: a u32 that ends at a block of any size
SMALL = 64 * KiB  # bytes: larger buffers are kept, because their page faults cost as much as copying
MAX_REPLY = MiB  # bytes of an answer in the handshake
MAX_CHUNK = 64 * MiB  # bytes of a chunk that brings no data
SCRATCH = 64 * KiB  # bytes that one receive may take in of replies and small data

_DONE = int(ChunkFlag.DONE)
_DATA = int(Chunk.OFFSET_DATA)
_HOLE = int(Chunk.OFFSET_HOLE)
_STATUS = int(Chunk.BLOCK_STATUS)
_IS_ERROR = 1 << 15  # in a chunk's type
_ZERO = int(Allocation.ZERO)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What a server says of an export in the handshake. Sizes are bytes."""

    uri: str
    name: str
    size: int
    flags: TransmissionFlag
    minimum_block: int  # every offset and length is a multiple
    preferred_block: int
    maximum_payload: int  # of one READ or WRITE
    structured: bool  # replies are
    allocation: int | None  # the id of base:allocation; None where the server does not say what is a hole

    @property
    def read_only(self) -> bool:
        return bool(self.flags & TransmissionFlag.READ_ONLY)


# Handshake ------------------------------------------------------------------------------------------------


def negotiate(uri: str, *, structured: bool = False) -> tuple[socket.socket, ExportFacts]:
    """Connect and agree on the export: the socket is the caller's, its next bytes are requests.

    `uri` is `nbd://HOST[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`. The kernel's client knows simple replies only;
    `structured` asks for the others and for base:allocation, and takes what there is. Raises Invalid, NotFound,
    Unreachable, Error.
    """
    return _agree(uri, Option.GO, structured)


def describe(uri: str) -> ExportFacts:
    """What the server says of an export, which is not used by that. Raises as `negotiate` does."""
    connected, facts = _agree(uri, Option.INFO, structured=False)
    connected.close()
    return facts


def _agree(uri: str, option: Option, structured: bool) -> tuple[socket.socket, ExportFacts]:
    address, name = _parse(uri)
    connected = _connected(uri, address)
    try:
        facts = _Handshake(connected, uri, name).run(option, structured)
        connected.settimeout(None)
    except BaseException as error:
        connected.close()
        match error:
            case EOFError():
                raise Unreachable(f"the server at {uri} closed the connection in the handshake") from error
            case OSError():
                raise Unreachable(f"the server at {uri} does not answer: {error.strerror or error}") from error
            case struct.error():
                raise _foreign(uri) from error
        raise
    return connected, facts


def _connected(uri: str, address: str | tuple[str, int]) -> socket.socket:
    try:
        if isinstance(address, tuple):
            connected = socket.create_connection(address, PATIENCE)  # whichever of a host's addresses answers
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connected
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(PATIENCE)
            connected.connect(address)
        except BaseException:
            connected.close()
            raise
        return connected
    except OSError as error:
        raise Unreachable(f"cannot connect to {uri}: {error.strerror or error}") from error


def _parse(uri: str) -> tuple[str | tuple[str, int], str]:
    """Where the server is, a path or a host and its port, and the name of the export."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or NBD_PORT
    except ValueError as error:
        raise Invalid(f"not a URI: {uri!r}: {error}") from error
    name = unquote(parts.path.removeprefix("/"))
    if len(name.encode()) > proto.MAX_STRING:
        raise Invalid(f"the name of an export has at most {proto.MAX_STRING} bytes")
    if parts.scheme == "nbd+unix" and (paths := parse_qs(parts.query).get("socket")):
        return paths[0], name
    if parts.scheme == "nbd" and host:
        return (host, port), name
    raise Invalid(f"not a URI of NBD: {uri!r} (write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH)")


class _Refused(Exception):
    """The server answered an option with an error."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(reply, text)
        self.reply = reply
        self.text = text


class _Handshake:
    def __init__(self, connected: socket.socket, uri: str, name: str) -> None:
        self._socket = connected
        self._uri = uri
        self._name = name

    def run(self, option: Option, structured: bool) -> ExportFacts:
        magic, second, offered = proto.GREETING.unpack(_receive(self._socket, proto.GREETING.size))
        if (magic, second) != (proto.NBDMAGIC, proto.IHAVEOPT) or not offered & HandshakeFlag.FIXED_NEWSTYLE:
            raise _foreign(self._uri)
        agreed = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        self._socket.sendall(proto.CLIENT_FLAGS.pack(agreed))
        allocation = None
        if structured:
            structured = self._accepts(Option.STRUCTURED_REPLY)
        if structured:
            allocation = self._select(proto.BASE_ALLOCATION)
        return self._info_or_go(option, structured, allocation)

    def _accepts(self, option: Option) -> bool:
        try:
            self._ask(option, b"")
        except _Refused:
            return False
        return True

    def _select(self, context: str) -> int | None:
        """Its id, where the server has it."""
        query = proto.STRING_LENGTH.pack(1) + proto.counted(context)
        try:
            replies = self._ask(Option.SET_META_CONTEXT, proto.counted(self._name) + query)
        except _Refused:
            return None
        for kind, data in replies:
            if kind == Reply.META_CONTEXT and data[proto.META_CONTEXT.size :] == context.encode():
                (identity,) = proto.META_CONTEXT.unpack_from(data)
                return int(identity)
        return None

    def _info_or_go(self, option: Option, structured: bool, allocation: int | None) -> ExportFacts:
        wanted = (1).to_bytes(2, "big") + Info.BLOCK_SIZE.to_bytes(2, "big")
        try:
            replies = self._ask(option, proto.counted(self._name) + wanted)
        except _Refused as refused:
            if refused.reply == Reply.ERR_UNKNOWN:
                raise NotFound(f"the server at {self._uri} has no export {self._name!r}") from None
            raise Error(f"the server at {self._uri} refuses: {refused.text or f'error {refused.reply:#x}'}") from None
        export = None
        minimum, preferred, maximum = 1, 4 * KiB, 32 * MiB  # what the protocol says where the server says nothing
        for kind, data in replies:
            if kind == Reply.INFO and data[:2] == Info.EXPORT.to_bytes(2, "big"):
                export = proto.INFO_EXPORT.unpack(data)[1:]
            elif kind == Reply.INFO and data[:2] == Info.BLOCK_SIZE.to_bytes(2, "big"):
                _, minimum, preferred, maximum = proto.INFO_BLOCK_SIZE.unpack(data)
        if export is None:
            raise _foreign(self._uri)
        return ExportFacts(
            uri=self._uri,
            name=self._name,
            size=export[0],
            flags=TransmissionFlag(export[1]),
            minimum_block=minimum,
            preferred_block=preferred,
            maximum_payload=maximum,
            structured=structured,
            allocation=allocation,
        )

    def _ask(self, option: Option, data: bytes) -> list[tuple[int, bytes]]:
        """The replies before its end. Raises _Refused."""
        self._socket.sendall(proto.OPTION.pack(proto.IHAVEOPT, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            header = _receive(self._socket, proto.OPTION_REPLY.size)
            magic, asked, kind, length = proto.OPTION_REPLY.unpack(header)
            if (magic, asked) != (proto.OPTION_REPLY_MAGIC, option) or length > MAX_REPLY:
                raise _foreign(self._uri)
            answer = bytes(_receive(self._socket, length))
            if kind == Reply.ACK:
                return replies
            if kind >> 31:
                raise _Refused(kind, answer.decode(errors="replace").strip())
            replies.append((kind, answer))


def _foreign(uri: str) -> Error:
    return Error(f"what answers at {uri} is no NBD server that this client understands")


def _receive(connected: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    _receive_into(connected, memoryview(buffer))
    return buffer


def _receive_into(connected: socket.socket, view: memoryview) -> None:
    """All of `view`. Raises EOFError where the connection ends before."""
    while view:
        count = connected.recv_into(view, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError("the connection ended")
        view = view[count:]


# Requests -------------------------------------------------------------------------------------------------


class _Request:
    """One that was sent, and what has come of its reply."""

    __slots__ = ("command", "data", "done", "error", "length", "missing", "offset", "statuses", "text")

    def __init__(self, command: int, offset: int, length: int, data: memoryview | None) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.data = data  # of a READ: where it goes
        self.missing = length if data is not None else 0  # bytes of it that have not come
        self.statuses: list[tuple[int, int]] | None = None  # of a BLOCK_STATUS
        self.error = 0
        self.text = ""
        self.done = False


class _Incoming:
    """What comes in: taken from the socket in large steps, looked at in small ones. Raises EOFError at its end."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._scratch = memoryview(bytearray(SCRATCH))
        self._start = self._end = 0  # what was received and not looked at

    def peek(self, length: int) -> memoryview:
        """The next bytes, good until the next call."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + length > SCRATCH:
            left = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, len(left)
            self._scratch[: len(left)] = left
        while self._end - self._start < length:
            count = self._socket.recv_into(self._scratch[self._end :])
            if not count:
                raise EOFError("the connection ended")
            self._end += count
        return self._scratch[self._start : self._start + length]

    def take(self, length: int) -> memoryview:
        """As `peek`, and go on behind them."""
        taken = self.peek(length)
        self._start += length
        return taken

    def fill(self, view: memoryview) -> None:
        """All of `view`."""
        count = min(len(view), self._end - self._start)
        view[:count] = self._scratch[self._start : self._start + count]
        self._start += count
        _receive_into(self._socket, view[count:])


class Disk:
    """A connection to an export. Offsets and lengths are bytes, multiples of `facts.minimum_block`.

    Not to be shared between threads. What a server refuses raises Error (ReadOnly, NoSpace, Invalid) and the
    connection goes on; a connection that is lost is closed and raises Unreachable.
    """

    def __init__(self, connected: socket.socket, facts: ExportFacts) -> None:
        self.facts = facts
        self._socket = connected
        self._request_size = min(REQUEST, facts.maximum_payload)
        self._incoming = _Incoming(connected)
        self._requests: dict[int, _Request] = {}  # in flight, by cookie
        self._bytes = 0  # of the writes among them
        self._reads = 0  # how many of them are READs
        self._cookie = 0
        self._pipelined = False
        self._failed: _Request | None = None  # the first that failed of those nobody waits for

    @property
    def size(self) -> int:
        return self.facts.size

    def close(self) -> None:
        """Say goodbye and go. What was not flushed may be lost.

        Where nothing was under way, the server has let go of the export afterwards: it may be renamed or removed.
        """
        with contextlib.suppress(OSError):
            self._socket.sendall(proto.REQUEST.pack(proto.REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
            if not self._requests:
                self._socket.settimeout(PATIENCE)
                self._socket.recv(1)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading

    def read(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return buffer

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """As much as `buffer` holds."""
        view = memoryview(buffer).cast("B")
        for at, data in self.read_many([(offset, len(view))]):
            view[at - offset : at - offset + len(data)] = data

    def read_many(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """What is at each (offset, length), in this order, in pieces of at most 1 MiB: pairs of offset and data.

        The data is good until the next piece is asked for. `extents` is read as needed, and may ask this connection.
        """
        pieces = _pieces(extents, self._request_size)
        waiting: deque[_Request] = deque()
        spare: list[bytearray] = []
        more = True
        while True:
            if more and len(waiting) <= IN_FLIGHT // 2 and _wanted(waiting) <= WINDOW // 2:
                more = self._ask_for_more(pieces, waiting, spare)
            if not waiting:
                return
            request = waiting.popleft()
            self._wait(request)
            assert request.data is not None
            yield request.offset, request.data
            if request.length > SMALL:
                buffer = request.data.obj
                assert isinstance(buffer, bytearray)
                spare.append(buffer)

    def _ask_for_more(
        self, pieces: Iterator[tuple[int, int]], waiting: deque[_Request], spare: list[bytearray]
    ) -> bool:
        """Fill what may be in flight; False where no piece is left."""
        headers = bytearray()
        wanted = _wanted(waiting)
        for offset, length in islice(pieces, IN_FLIGHT - len(waiting)):
            if length <= SMALL:
                buffer = bytearray(length)
            else:
                buffer = spare.pop() if spare else bytearray(self._request_size)
            request = _Request(Command.READ, offset, length, memoryview(buffer)[:length])
            headers += self._header(request, 0)
            self._reads += 1
            waiting.append(request)
            wanted += length
            if wanted >= WINDOW:
                break
        self._send(headers)
        return bool(headers)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Pairs of a length and its flags (proto.Allocation), from `offset` on: at least one, maybe not all.

        Without base:allocation everything is data.
        """
        if self.facts.allocation is None:
            return [(length, 0)]
        request = self._submit(Command.BLOCK_STATUS, offset, min(length, EFFECT), CommandFlag(0))
        self._wait(request)
        if not request.statuses or any(not each for each, _ in request.statuses):
            raise self._garbled("a block status without extents")
        return request.statuses

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """All of the export, or `length` bytes of it, as runs of data and of zeroes, ascending, without a gap."""
        end = self.size if length is None else offset + length
        start, data = offset, True  # of the run that has not ended
        while offset < end:
            for count, status in self.block_status(offset, end - offset):
                if offset >= end:
                    break
                # A hole that is not known to be zeroes may be anything: it is read, as data is.
                if (not status & _ZERO) is not data:
                    if offset > start:
                        yield Extent(start, offset - start, data)
                    start, data = offset, not data
                offset = min(offset + count, end)
        if offset > start:
            yield Extent(start, offset - start, data)

    # -- changing

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        for at, length in _pieces([(offset, len(view))], self._request_size):
            self._change(Command.WRITE, at, length, CommandFlag(0), view[at - offset : at - offset + length])
        self._settle()

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make zeroes of a range, and a hole; with `allocate` the server keeps the space."""
        flags = CommandFlag.NO_HOLE if allocate else CommandFlag(0)
        if self.facts.flags & TransmissionFlag.SEND_WRITE_ZEROES:
            for at, count in _pieces([(offset, length)], EFFECT):
                self._change(Command.WRITE_ZEROES, at, count, flags)
        else:
            zeroes = memoryview(bytes(self._request_size))
            for at, count in _pieces([(offset, length)], self._request_size):
                self._change(Command.WRITE, at, count, CommandFlag(0), zeroes[:count])
        self._settle()

    def trim(self, offset: int, length: int) -> None:
        """What is in the range is not needed any more; what it reads as is the server's to choose."""
        if self.facts.flags & TransmissionFlag.SEND_TRIM:
            for at, count in _pieces([(offset, length)], EFFECT):
                self._change(Command.TRIM, at, count, CommandFlag(0))
        self._settle()

    def flush(self) -> None:
        """Make durable what was written, by whomever."""
        self._drain()
        if self.facts.flags & TransmissionFlag.SEND_FLUSH:
            self._wait(self._submit(Command.FLUSH, 0, 0, CommandFlag(0)))

    @contextlib.contextmanager
    def pipelined(self) -> Iterator[Self]:
        """Inside, `write`, `zero` and `trim` return before they are answered, when their data is not needed any more.

        At the end all are; the first that failed is raised, then or before. They are carried out in any order: ranges
        that overlap do not belong into one pipeline.
        """
        self._pipelined = True
        try:
            yield self
        finally:
            self._pipelined = False
        self._settle()

    def _change(self, command: Command, offset: int, length: int, flags: CommandFlag, data: Buffer = b"") -> None:
        while len(self._requests) >= IN_FLIGHT or self._bytes >= WINDOW or self._reads:
            self._receive()
        if self._failed is not None:
            self._drain()
        self._submit(command, offset, length, flags, data)

    def _settle(self) -> None:
        """Wait for all changes, unless the end of the pipeline will."""
        if not self._pipelined:
            self._drain()

    def _drain(self) -> None:
        while self._requests:
            self._receive()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise self._error(failed)

    # -- the connection

    def _header(self, request: _Request, flags: int) -> bytes:
        self._cookie += 1
        self._requests[self._cookie] = request
        return proto.REQUEST.pack(
            proto.REQUEST_MAGIC, flags, request.command, self._cookie, request.offset, request.length
        )

    def _submit(self, command: Command, offset: int, length: int, flags: CommandFlag, data: Buffer = b"") -> _Request:
        request = _Request(command, offset, length, None)
        header = self._header(request, flags)
        if command == Command.WRITE:
            self._bytes += length
        self._send(header, data)
        return request

    def _send(self, header: Buffer, data: Buffer = b"") -> None:
        views = [memoryview(header), memoryview(data)]
        with self._guarded():
            sent = self._socket.sendmsg(views)
            for view in views:
                if sent < len(view):
                    self._socket.sendall(view[sent:])
                sent = max(sent - len(view), 0)

    def _wait(self, request: _Request) -> None:
        while not request.done:
            self._receive()
        if request.error:
            if self._failed is request:
                self._failed = None
            raise self._error(request)

    def _receive(self) -> None:
        """One simple reply, or one chunk of another."""
        with self._guarded():
            (magic,) = proto.REPLY_MAGIC.unpack(self._incoming.peek(proto.REPLY_MAGIC.size))
            if magic == proto.STRUCTURED_REPLY_MAGIC and self.facts.structured:
                _, flags, kind, cookie, length = proto.CHUNK.unpack(self._incoming.take(proto.CHUNK.size))
                request = self._find(cookie)
                self._receive_chunk(request, kind, length)
                if flags & _DONE:
                    self._finish(cookie, request)
            elif magic == proto.SIMPLE_REPLY_MAGIC:
                _, request_error, cookie = proto.SIMPLE_REPLY.unpack(self._incoming.take(proto.SIMPLE_REPLY.size))
                request = self._find(cookie)
                request.error = request_error
                if request.data is not None and not request_error:
                    self._incoming.fill(request.data)
                    request.missing = 0
                self._finish(cookie, request)
            else:
                raise self._garbled(f"the magic number {magic:#x}")

    def _receive_chunk(self, request: _Request, kind: int, length: int) -> None:
        if kind == _DATA and length > proto.DATA_PAYLOAD.size:
            (offset,) = proto.DATA_PAYLOAD.unpack(self._incoming.take(proto.DATA_PAYLOAD.size))
            self._incoming.fill(self._part(request, offset, length - proto.DATA_PAYLOAD.size))
            return
        if length > MAX_CHUNK:
            raise self._garbled(f"a chunk of {length} bytes")
        payload = bytearray(length)
        self._incoming.fill(memoryview(payload))
        if kind == _HOLE and length == proto.HOLE_PAYLOAD.size:
            offset, count = proto.HOLE_PAYLOAD.unpack(payload)
            hole = self._part(request, offset, count)
            hole[:] = bytes(count)
        elif kind == _STATUS and length % proto.STATUS_EXTENT.size == proto.STATUS_PAYLOAD.size:
            if proto.STATUS_PAYLOAD.unpack_from(payload)[0] == self.facts.allocation:
                request.statuses = list(
                    proto.STATUS_EXTENT.iter_unpack(memoryview(payload)[proto.STATUS_PAYLOAD.size :])
                )
        elif kind & _IS_ERROR and length >= proto.ERROR_PAYLOAD.size:
            error, count = proto.ERROR_PAYLOAD.unpack_from(payload)
            request.error = error or Errno.EIO
            request.text = payload[proto.ERROR_PAYLOAD.size :][:count].decode(errors="replace").strip()
        elif kind != Chunk.NONE:
            raise self._garbled(f"a chunk of type {kind} and {length} bytes")

    def _part(self, request: _Request, offset: int, length: int) -> memoryview:
        """Where a chunk's data goes."""
        start = offset - request.offset
        if request.data is None or start < 0 or start + length > request.length:
            raise self._garbled(f"data for {length} bytes at {offset} that nobody asked for")
        request.missing -= length
        return request.data[start : start + length]

    def _find(self, cookie: int) -> _Request:
        request = self._requests.get(cookie)
        if request is None:
            raise self._garbled("a reply to what nobody asked for")
        return request

    def _finish(self, cookie: int, request: _Request) -> None:
        del self._requests[cookie]
        request.done = True
        if request.command == Command.WRITE:
            self._bytes -= request.length
        elif request.command == Command.READ:
            self._reads -= 1
        if not request.error and request.missing:
            raise self._garbled(f"{request.length - request.missing} of {request.length} bytes at {request.offset}")
        if request.error and request.data is None and self._failed is None:
            self._failed = request

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """After half a reply, or half a request, the connection is of no use any more."""
        try:
            yield
        except (OSError, EOFError) as error:
            self._socket.close()
            raise Unreachable(f"the connection to {self.facts.uri} was lost") from error
        except BaseException:
            self._socket.close()
            raise

    def _garbled(self, what: str) -> Error:
        return Error(f"the server at {self.facts.uri} sent {what}, which the protocol does not allow")

    def _error(self, request: _Request) -> Error:
        name, reason = self.facts.name, os.strerror(request.error)
        text = "" if request.text in ("", reason) else f": {request.text}"
        match request.error:
            case Errno.EPERM:
                return ReadOnly(f"{name!r} cannot be written: it is read-only{text}")
            case Errno.ENOSPC:
                return NoSpace(f"no space is left to write {name!r}{text}")
            case Errno.ESHUTDOWN:
                return Unreachable(f"the server at {self.facts.uri} stops{text}")
        what = Command(request.command).name.lower().replace("_", " ")
        where = f"{what} of {request.length} bytes at {request.offset} of {name!r}"
        kind = Invalid if request.error == Errno.EINVAL else Error
        return kind(f"{where}: {reason}{text}")


def connect(uri: str) -> Disk:
    """Connect to an export. Raises Invalid, NotFound, Unreachable, Error."""
    return Disk(*negotiate(uri, structured=True))


def _pieces(extents: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        while length > most:
            yield offset, most
            offset, length = offset + most, length - most
        if length:
            yield offset, length


def _wanted(waiting: deque[_Request]) -> int:
    return sum(request.length for request in waiting)

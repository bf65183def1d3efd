"""NBD over sockets: connections, requests in flight, replies.

A connection is a receiver that hands its buffers to the event loop, a handshake, and then an export. One receive brings
in many requests; all of them are parsed in one turn, what can be answered at once is (from the page cache, or by a
write into it), and the replies leave with one gathered write. What may block becomes a task. Rules:

- a refused WRITE's payload is consumed before anything else is read;
- replies may leave in any order, so nothing waits for a slow request but itself;
- clients share the loop: who sends much gets no more of a turn than twice what the one before it got, until it has had
  ALONE turns with nobody between, so that one who asks for little does not wait for a whole queue of another's;
- who waits for each answer before he asks again is woken by the first bytes of it while his request is handled: on a
  processor that sleeps he needs longer to be there than most requests take;
- bytes in flight are bounded: reading pauses while too much is being worked on, or while the peer does not take its
  replies, also in the middle of a batch;
- a connection uses its export until its last request has ended, even when the peer is gone by then;
- a stopping server parses what it has received, answers it, and closes. It never answers ESHUTDOWN: the kernel's
  client makes an I/O error of that, whereas it sends again what was not answered;
- and it lets who is in the handshake finish it first: a client that comes back after a lost connection takes one that
  is closed before it was given its export for a refusal, and gives up for good.

What is legal is decided in wire/, what happens to data in pool/.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from nbdthin.errors import Error, NoSpace, PoolFailed, ReadOnly
from nbdthin.outbox import ARENA, HIGH, Outbox
from nbdthin.pool import extents
from nbdthin.pool.data import NOWAIT
from nbdthin.pool.livevolume import Pieces
from nbdthin.pool.readers import MISSES, Read, Segments
from nbdthin.pool.threads import Ended
from nbdthin.pool.volume import ZERO
from nbdthin.pool.waiting import GivenUp
from nbdthin.units import KiB, MiB
from nbdthin.wire import proto, transmission
from nbdthin.wire.handshake import Handshake, HandshakeState, Negotiated
from nbdthin.wire.proto import Chunk, ChunkFlag, Command, CommandFlag, Errno

if TYPE_CHECKING:
    from nbdthin.server import Server

SCRATCH = 256 * KiB  # bytes received at once; a full queue of small writes
INLINE_READ: Final = 1 * MiB  # bytes; a larger read's copy would hold up the loop for longer than a thread costs
SEND_BUFFER = 4 * MiB  # bytes
LOCAL_SEND_BUFFER = 512 * KiB  # over TCP to the same machine: what is sent and received stays in the processor's cache
UNIX_SEND_BUFFER = 1 * MiB  # and as many: what is in it is lent (lent.py), so that a peer may keep it from others
PIECE: Final = 64 * KiB  # bytes of a write beyond which it is written as it comes in, up to each multiple of that
IN_FLIGHT: Final = 64 * MiB  # bytes a connection may have in work: one request of the largest size
WAITING: Final = 64 * MiB  # bytes beyond these, if so much waits for space
REQUEST_COST: Final = 512 * KiB  # bytes that a request in work counts for at least: the kernel has 128 of them
TURN: Final = 500e-6  # seconds for which the loop stays with a connection that is alone
ALONE: Final = 8  # turns that one client has had, or flushes, while all others were silent: it may be waited for
LONE: Final = 16  # requests of one who waits for each answer, lately, from which on the next one is taken for such
SHARE: Final = 4  # requests of a client's turn, or twice what the one before it got: large ones count as more
ALL: Final = 1 << 30  # requests: no share
COLD: Final = 15  # small reads after one that was not cached that are taken to be not cached either
NEAR: Final = 256 * KiB  # bytes from the read before, within which the kernel may be reading ahead
SEND: Final = 32 * KiB  # bytes of one part of the data file from which on it is read when it is sent
AHEAD: Final = 8 * MiB  # bytes behind one of several large reads in order that the disk is asked for before the client
AHEAD_STEP: Final = 1 * MiB  # bytes asked for at once
HANDSHAKE_TIMEOUT = 10.0  # seconds for each option; a client that holds a socket and says nothing is a leak
LAST_HANDSHAKES = 1.0  # seconds for all of its handshake that is left to a client when the server stops
LINGER = 60.0  # seconds that a closing connection gives its peer to take the last replies
GOODBYE = 1.0  # seconds that a client has to close its side when the server stops
STATUS_EXTENTS = 16384  # extents in one BLOCK_STATUS reply, of 128 KiB then; the client asks again for the rest

_SO_SNDBUFFORCE = 32
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_FLUSH: Final = int(Command.FLUSH)
_TRIM: Final = int(Command.TRIM)
_CACHE: Final = int(Command.CACHE)
_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_DONE: Final = int(ChunkFlag.DONE)
_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)
_CHUNK_MAGIC: Final = proto.STRUCTURED_REPLY_MAGIC
_SIMPLE_MAGIC: Final = proto.SIMPLE_REPLY_MAGIC
_REQUEST_HEADER: Final = proto.REQUEST.size
_SIMPLE_HEADER: Final = proto.SIMPLE_REPLY.size
_DATA_HEADER: Final = proto.OFFSET_DATA.size
_REQUEST_MAGIC: Final = proto.REQUEST_MAGIC
_unpack_request: Final = proto.REQUEST.unpack_from
_refuse: Final = transmission.refuse
_preadv: Final = os.preadv
_fadvise: Final = os.posix_fadvise
_WILLNEED: Final = os.POSIX_FADV_WILLNEED
_CHUNK: Final = _CHUNK_MAGIC.to_bytes(4, "big")
_SIMPLE: Final = _SIMPLE_MAGIC.to_bytes(4, "big")
_pack_simple_into: Final = proto.SIMPLE_REPLY.pack_into
_pack_data_into: Final = proto.OFFSET_DATA.pack_into
_simple: Final = transmission.simple_reply

log = logging.getLogger("nbdthin.server")


class Connection(asyncio.BufferedProtocol):
    """One client. Phases: handshake, then transmission, then closing (no request is parsed any more)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._live = server.live
        self._loop = asyncio.get_running_loop()
        self._poller = server.poller
        self.closed: asyncio.Future[None] = self._loop.create_future()  # done when nothing of it is left
        self.peer = "?"
        self._outbox: Outbox
        self._handshake: Handshake | None = Handshake(server)  # None in transmission
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False  # nothing more is received; what was, is handled
        self._closing = False  # no request is parsed any more
        self._goodbye = False  # the client has said that it goes
        self._half_close = False  # at its end, only our direction is closed at first
        self._discarding = False  # what comes in is of no interest any more
        self._lingering = False  # all is answered, and what is sent of it is the peer's affair
        self._lost = False  # the transport is gone
        self.gone = False  # so it is, or soon will be: what waits for space need not
        self._view = new_buffer(SCRATCH)
        self._end = 0  # bytes in scratch
        self._left = 0  # bytes to come of a large write that is written as it comes in
        self._pieces: Pieces | None = None  # and what the pool knows of it
        self._payload: memoryview | None = None  # of one that cannot be, while it comes in
        self._offered = 0  # bytes of the buffer that was handed out last
        self._filled = 0
        self._payload_request = (0, 0, 0)  # flags, cookie, offset of what is to come
        self._skip = 0  # bytes of a refused payload still to come
        self._skipped = b""  # the reply to follow them
        self._writes = 0  # since the last flush
        self._alternations = 0  # flushes with one write before each of them, the last ones
        self._flush_due = False
        self._lone = 0  # requests that were waited for, one by one, lately; at most 2 * LONE
        self._begins = False  # the one that is handled is such: its reply may begin before that
        self._hit = False  # the last small read was cached
        self._cold = 0  # so many reads more are asked of the disk without a look at the cache
        self._last_position = 0  # of the last small read
        self._read_to = -1  # bytes of the volume: the end of the last large read
        self._ahead_to = 0  # and of what the disk was asked for, while large reads come in order; 0: nothing
        self._tasks = 0  # requests in work
        self._in_flight = 0  # bytes they stand for
        self._waiting = 0  # bytes of those that wait for space
        self._paused = False  # we do not read
        self._yielding = False  # so that others have their turn

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, of the same methods
        sock = self._transport.get_extra_info("socket")
        _enlarge(sock)
        arena = self._server.arena
        self._outbox = Outbox(self._live, sock.fileno(), arena, self._outbox_changed, self._outbox_lost)
        watch = select.poll()
        watch.register(self._outbox.fd, select.POLLIN)
        self._ready = watch.poll
        self._put = self._outbox.put
        self._flush = self._outbox.flush
        if not self._server.add(self):
            self._closing = True
            self._transport.abort()
            return
        assert self._handshake is not None
        self.peer = _peer_name(self._transport)
        self._put(self._handshake.greeting())
        self._flush()
        self._restart_timer(HANDSHAKE_TIMEOUT, self.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._discarding:
            return self._view
        if self._payload is not None:
            buffer = self._payload[self._filled :]
        else:
            buffer = self._view[self._end :]
        self._offered = len(buffer)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._discarding:
            return
        self._poller.came()
        self._received(nbytes)
        self._poller.answered()
        server = self._server
        alone = server.turns_alone > ALONE and server.speaker is self
        if nbytes == self._offered:  # the transport would go on by itself, up to 32 times in one turn of the loop
            if not alone:
                self._let_others()
        elif alone and self._handshake is None:
            self._receive_more()

    def _received(self, nbytes: int) -> None:
        if self._payload is None:
            self._end += nbytes
            self._advance()
        else:
            self._filled += nbytes
            if self._filled == len(self._payload):
                self._payload_complete(self._payload)

    def _receive_more(self) -> None:
        """Take what this client sends next past the transport: while nobody else asks for anything, a turn of the loop
        for each request would only cost. What ends the connection is left for the transport to find.
        """
        poller, ready, fd = self._poller, self._ready, self._outbox.fd
        until = poller.time + TURN
        while poller.time < until and not (self._tasks or self._paused or self._closing):
            if ready(0):
                if not (self._end or self._left or self._payload is not None):  # else it is more of the same request
                    self._lone = max(self._lone - LONE, 0)
            elif poller.wait(ready):
                self._lone = min(self._lone + 1, 2 * LONE)
            else:
                return
            try:
                nbytes = os.readv(fd, (self.get_buffer(-1),))
            except OSError:
                return
            if not nbytes:
                return
            self._received(nbytes)
            poller.answered()

    def eof_received(self) -> bool:
        if self._discarding:
            return False  # closes
        self._finish_receiving()
        return True  # what was received is still answered

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._closing = True
        self._give_up()
        if self._timer is not None:
            self._timer.cancel()
        self._outbox.close()
        self._maybe_close()

    # -- closing

    def stop(self) -> None:
        """Parse no more than was received; answer it, then close. A handshake is finished first."""
        if self._closing:
            return
        if self._handshake is not None:
            self._restart_timer(LAST_HANDSHAKES, self.abort)
        else:
            self._half_close = True
            self._finish_receiving()

    def abort(self) -> None:
        """Close now; requests in work end by themselves, unanswered, and none waits for space any more."""
        self._closing = True
        self._give_up()
        if not self._lost:
            self._transport.abort()
            self._outbox.close()  # the connection ends with it

    # -- waiting for space (pool.waiting.Asker)

    @contextlib.contextmanager
    def waiting(self, length: int) -> Iterator[None]:
        """What waits is no work: what the client asks for meanwhile may be what makes the space."""
        cost = max(length, REQUEST_COST)
        self._waiting += cost
        self._control_flow()
        try:
            yield
        finally:
            self._waiting -= cost

    def _give_up(self) -> None:
        if not self.gone:
            self.gone = True
            self._end_pieces()
            if self._tasks:
                self._live.space_came()

    def _finish_receiving(self) -> None:
        self._draining = True
        self._pause()
        self._advance()
        if self._handshake is not None:
            self._closing = True
        self._maybe_close()

    def _maybe_close(self) -> None:
        if not self._closing or self._tasks:
            return
        if self._lost:
            if not self.closed.done():
                if self._handshake is None:
                    self._server.remove(self, self._volume, may_return=self._info.lasting and not self._goodbye)
                else:
                    self._server.remove(self, None)
                # In a cycle with its outbox the connection stays until a collector comes, which may be long.
                self._view = memoryview(b"")
                self.closed.set_result(None)
        elif not self._discarding:  # else the goodbye is under way
            self._flush()
            if self._outbox.pending:
                if not self._lingering:
                    self._lingering = True
                    self._restart_timer(LINGER, self.abort)  # the peer may never take what is still to be sent
            elif self._half_close:
                self._say_goodbye()
            else:
                self._transport.close()

    def _say_goodbye(self) -> None:
        """Close our direction first, and the connection when the peer has closed its own.

        Closing a socket that holds unread requests resets the connection, and may destroy replies on their way.
        """
        self._transport.write_eof()
        self._discarding = True
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._restart_timer(GOODBYE, self._goodbye_over)

    def _goodbye_over(self) -> None:
        """The peer does not close; it has what it will get."""
        self._transport.close()

    # -- flow control

    def _control_flow(self) -> None:
        if self._yielding:  # `_go_on` is on its way
            return
        if self._stalled:
            self._pause()
        elif self._paused and not self._closing:
            if not self._draining:
                self._paused = False
                self._transport.resume_reading()
            self._advance()

    def _outbox_changed(self) -> None:
        if self.gone:  # nobody is there to say goodbye to: `connection_lost` is on its way
            return
        self._control_flow()
        if self._closing:
            self._maybe_close()

    def _outbox_lost(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            log.info("%s: a reply cannot be sent: %s", self.peer, error)
        self.abort()

    @property
    def _stalled(self) -> bool:
        return self._outbox.slow or self._in_flight - min(self._waiting, WAITING) >= IN_FLIGHT

    def _let_others(self) -> None:
        """Let the loop turn before the next request, and what is to be received for it."""
        self._pause()
        if not self._yielding:
            self._yielding = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._yielding = False
        self._control_flow()
        self._poller.answered()  # or it would take our own work for the client's silence

    def _pause(self) -> None:
        if not self._paused and not self._lost:
            self._paused = True
            self._transport.pause_reading()

    # -- handshake

    def _restart_timer(self, seconds: float, over: Callable[[], None]) -> None:
        """Give the peer so long; one deadline at a time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, over)

    def _advance(self) -> None:
        """Handle what is in scratch."""
        if self._handshake is None:
            self._parse()
        elif not self._closing:
            self._negotiate(self._handshake)

    def _negotiate(self, handshake: Handshake) -> None:
        handshake.receive(self._view[: self._end])
        self._end = 0
        while not self._outbox.slow and (reply := handshake.step()) is not None:
            if not self._server.stopping:
                self._restart_timer(HANDSHAKE_TIMEOUT, self.abort)
            if reply:
                self._put(reply)
                self._flush()
        if handshake.state is HandshakeState.OPEN:
            return
        if handshake.state is HandshakeState.DONE:
            assert self._timer is not None
            self._timer.cancel()
            self._begin_transmission(handshake.result, handshake.rest())
            if self._server.stopping:
                self.stop()
        else:
            if handshake.reason:
                log.info("%s: handshake failed: %s", self.peer, handshake.reason)
            self._closing = True
            self._maybe_close()

    def _begin_transmission(self, agreed: Negotiated, rest: bytes) -> None:
        self._handshake = None
        self._info = agreed.export
        self._device = self._server.use(self, agreed.export.name)
        self._volume = self._device.volume
        self._rules = transmission.legality(agreed)
        plain = transmission.plain_lengths(self._rules)
        self._plain_read, self._plain_write = plain.get(_READ, 0), plain.get(_WRITE, 0)
        self._structured = agreed.structured
        self._contexts = agreed.contexts
        data = self._live.pool.data
        self._data_fd = data.fd
        self._readers = self._live.readers
        # Chosen once: who does not want data verified pays nothing for it.
        verify = self._live.pool.policy.verify
        self._answer_read = Connection._read_verified if verify else Connection._read
        self._small = 0 if verify or not data.nowait else SEND  # bytes below which a read is tried by `_read_small`
        self._data_header = _DATA_HEADER if agreed.structured else _SIMPLE_HEADER
        log.info("%s: connected to %s", self.peer, agreed.export.name)
        # What came behind the handshake is at most an option's length, but may be more than scratch holds.
        position = 0
        while position < len(rest):
            space = self.get_buffer(-1)
            if not len(space):  # no client sends that much before it knows that it may
                self.abort()
                return
            part = rest[position : position + len(space)]
            space[: len(part)] = part
            position += len(part)
            self._received(len(part))

    # -- transmission

    def _parse(self) -> None:
        """Handle every whole request in scratch."""
        view, end = self._view, self._end
        received = end
        server = self._server
        changed = server.speaker is not self
        if changed:
            server.speaker, server.turns_alone, server.flushes_alone = self, 0, 0
            if self._writes > 1 or not self._alternations:
                self._live.flushes = 0
            server.share = max(2 * server.handled, SHARE)
        server.turns_alone += 1
        left = share = server.share if server.turns_alone <= ALONE else ALL
        outbox = self._outbox
        position = 0
        answered = False  # something, at once
        waiting = False  # for something before it goes on with what is in scratch
        volume, device = self._volume, self._device
        plain_read, plain_write = self._plain_read, self._plain_write
        flags: int  # said to be one, as they all are: what is compiled keeps them unboxed
        command: int
        cookie: int
        offset: int
        length: int
        if self._skip:
            position = min(self._skip, end)
            self._skip -= position
            if not self._skip:
                self._put(self._skipped)
        elif self._left and not self._closing:
            position = self._take_pieces(0)
            if position < 0:
                end = position
        lone = self._lone > LONE and server.turns_alone > ALONE and not (position or self._tasks)
        while end - position >= _REQUEST_HEADER and not self._closing:
            if left <= 0:
                self._let_others()
                waiting = True
                break
            if outbox.slow or (self._in_flight >= IN_FLIGHT and self._stalled):
                self._pause()
                waiting = True
                break
            magic, flags, command, cookie, offset, length = _unpack_request(view, position)
            left -= 1
            if magic != _REQUEST_MAGIC:
                log.info("%s: not a request, magic number %#x", self.peer, magic)
                self.abort()
                return
            most = plain_read if command == _READ else plain_write if command == _WRITE else 0
            plain = not flags and 0 < length <= most and offset + length <= volume.size
            if plain:
                left -= length >> 16
                start = position + _REQUEST_HEADER
                stop = start if command == _READ else start + length
                if lone:
                    lone = False
                    self._begins = stop == end
                    if stop < end:
                        self._lone = 0
                try:
                    if command == _READ:
                        done = length < self._small and self._read_small(cookie, offset, length)
                    else:
                        # Not before a flush, which takes longer than to wake somebody.
                        begins = self._begin if self._begins and (self._writes or not self._alternations) else None
                        done = length <= PIECE and stop <= end and device.write_small(offset, view[start:stop], begins)
                        if done:
                            self._written(0, cookie)
                except Exception as failure:
                    self._fail(command, cookie, failure)
                    done = True
                if done:
                    position = stop
                    answered = True
                    continue
            error = 0 if plain else _refuse(self._rules, command, flags, offset, length, volume.size)
            if command == _WRITE:
                position = self._take_write(position, flags, cookie, offset, length, error)
                if position < 0:
                    break
                continue
            position += _REQUEST_HEADER
            if error:
                self._answer_error(command, cookie, error)
            elif command == _DISC:
                self._goodbye = True
                self._pause()
                self._closing = True
            else:
                try:
                    if command == _READ:
                        self._answer_read(self, flags, cookie, offset, length)
                    elif command == _FLUSH:
                        self._flush_volume(cookie, end - position < _REQUEST_HEADER)
                    else:
                        self._other(command, flags, cookie, offset, length)
                except Exception as failure:
                    self._fail(command, cookie, failure)
            if outbox.pending >= HIGH:
                self._flush()
            if command == _BLOCK_STATUS:  # milliseconds
                self._let_others()
                waiting = True
                break
        self._begins = False
        if position >= 0:
            self._keep_from(position)
        if received > self._end:
            server.handled = share - left + (received - self._end >> 14)
        self._flush()
        if changed:
            self._live.readers.speaker_changed(answered)
        if self._alternations > ALONE and self._writes == 1 and not self._end and not self._tasks:
            self._sync_early()
        if self._draining and not waiting:
            self._closing = True
        if self._closing:
            self._maybe_close()

    def _take_write(self, position: int, flags: int, cookie: int, offset: int, length: int, error: int) -> int:
        """Handle the write whose header is at `position`. Returns where the next request begins.

        -1: nothing more can be parsed now, and `_end` says what is left in scratch.
        """
        start = position + _REQUEST_HEADER
        have = self._end - start
        if error:
            if length > proto.MAX_PAYLOAD:
                log.info("%s: a write of %d bytes", self.peer, length)
                self.abort()
                self._end = 0
                return -1
            return self._refuse(start, length, self._reply(cookie, error))
        if length > PIECE:
            self._payload_request = (flags, cookie, offset)
            self._left = length
            self._pieces = self._device.begin_pieces(length)
            return self._take_pieces(start) if self._pieces is not None else self._take_whole(start)
        if have >= length:
            self._write(flags, cookie, offset, self._view[start : start + length], False)
            return start + length
        self._keep_from(position)
        return -1

    def _take_pieces(self, position: int) -> int:
        """Write what is here, from `position` on, of a large write. Returns as `_take_write`.

        While one piece goes into the page cache, the client fills the socket with the next. Each is a write by itself:
        nothing is held between them, for as long as the client may take.
        """
        flags, cookie, offset = self._payload_request
        left, pieces = self._left, self._pieces
        view, end, device = self._view, self._end, self._device
        while left:
            count = min(left, PIECE - offset % PIECE)
            if end - position < count:
                self._keep_from(position)
                break
            try:
                if not device.write_now(offset, view[position : position + count], pieces):
                    self._payload_request, self._left = (flags, cookie, offset), left
                    self._end_pieces()
                    return self._take_whole(position)
            except Exception as error:
                self._left = 0
                self._end_pieces()
                return self._refuse(position, left, self._reply(cookie, self._told(_WRITE, error)))
            position += count
            offset += count
            left -= count
        else:
            self._left = 0
            self._end_pieces()
            self._written(flags, cookie)
            return position
        self._payload_request, self._left = (flags, cookie, offset), left
        return -1

    def _end_pieces(self) -> None:
        pieces, self._pieces = self._pieces, None
        if pieces is not None:
            self._device.end_pieces(pieces)

    def _take_whole(self, position: int) -> int:
        """The rest of a large write, from `position` on, when all of it is here. Returns as `_take_write`."""
        left, self._left = self._left, 0
        have = self._end - position
        if have >= left:
            self._write(*self._payload_request, self._view[position : position + left], False)
            return position + left
        payload = self._payload = new_buffer(left)
        payload[:have] = self._view[position : self._end]
        self._filled = have
        self._end = 0
        return -1

    def _refuse(self, position: int, length: int, reply: bytes) -> int:
        """Let `reply` follow a payload: libnbd, for one, forgets an error that overtakes it. Returns what is behind it,
        or the end of what is here.
        """
        have = self._end - position
        self._skip = max(length - have, 0)
        self._skipped = reply
        if not self._skip:
            self._put(reply)
        return position + min(length, have)

    def _keep_from(self, position: int) -> None:
        """What is in scratch from `position` on is for the next time."""
        left = self._end - position
        if left and position:
            self._view[:left] = self._view[position : self._end]  # memmove: they may overlap
        self._end = left

    def _payload_complete(self, payload: memoryview) -> None:
        self._payload = None
        self._write(*self._payload_request, payload, True)
        self._flush()

    # -- commands

    def _read_small(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a read of what lies in one place, or begin to; False: it does not. Nothing is cheaper than this."""
        position = self._volume.locate(offset, length)
        if position <= 0:
            return False
        unseen = False
        if self._cold and not self._is_awaited:
            # Being refused costs as much again as asking the disk unseen. One in so many is tried all the same; and one
            # that is near the one before, as the kernel may have read ahead, and does so only for whoever tries.
            last, self._last_position = self._last_position, position
            self._cold -= 1
            unseen = not -NEAR < position - last < NEAR
        if unseen:
            _fadvise(self._data_fd, position, length, _WILLNEED)
        else:
            outbox, header = self._outbox, self._data_header
            if self._begins and self._hit:
                self._begin()
            start = outbox.room(header + length) if outbox.used else 0
            end = start + header + length
            arena = outbox.arena
            try:
                count = _preadv(self._data_fd, (arena[start + header : end],), position, NOWAIT)
            except OSError:  # not cached, or worse: the slow way finds out
                count = -1
            self._hit = count == length
            if count != length and self._is_awaited:
                done = self._readers.wait_for([(position, length)], arena[start + header : end])
                count = length if done else -1
            if count == length:
                if self._structured:
                    _pack_data_into(arena, start, _CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, 8 + length, offset)
                else:
                    _pack_simple_into(arena, start, _SIMPLE_MAGIC, 0, cookie)
                outbox.used = end
                return True
            self._cold = COLD
        readers = self._readers
        turn = readers.turn or readers.begin_turn()
        turn.count += 1
        readers.waiting.append((turn, self, position, length, cookie, offset))
        self._tasks += 1
        self._in_flight += REQUEST_COST
        return True

    @property
    def _is_awaited(self) -> bool:
        """The one request that is here is all that any client asks for."""
        return self._end == _REQUEST_HEADER and self._server.turns_alone > ALONE and not self._tasks

    def _begin(self) -> None:
        """Of a reply whose client waits for nothing else. While it has only begun, all are of its kind (`_reply`), so
        that the next one that leaves may be any.
        """
        self._outbox.begin(_CHUNK if self._structured else _SIMPLE)

    def _reply(self, cookie: int, error: int = 0, to_read: bool = False) -> bytes:
        """One that has no data."""
        if not self._structured or not (to_read or self._outbox.begun):
            return _simple(error, cookie)
        return transmission.error_chunk(cookie, error, os.strerror(error)) if error else transmission.none_chunk(cookie)

    # -- small reads that have begun (pool.readers.Taker)

    def take(self, waiting: deque[Read], missed: list[Read]) -> None:
        """As `_read_small` answers what is cached; and send it, as the arena is for whoever has his turn. Written out
        again: a call for each would cost both ways 4 %.
        """
        outbox, header, structured, readers = self._outbox, self._data_header, self._structured, self._readers
        arena, fd, gone = outbox.arena, self._data_fd, self.gone
        used = outbox.used
        taken = 0
        while waiting and waiting[0][1] is self:
            read = waiting.popleft()
            turn, _, position, length, cookie, offset = read
            if not gone:  # else nobody wants it
                end = used + header + length
                if end > ARENA:
                    outbox.used = used
                    self._flush()
                    used = 0
                    end = header + length
                try:
                    if _preadv(fd, (arena[used + header : end],), position, NOWAIT) != length:
                        raise BlockingIOError
                except BlockingIOError:
                    missed.append(read)
                    if len(missed) == MISSES:
                        break
                    continue
                except OSError as error:
                    self._fail(_READ, cookie, error)
                else:
                    if structured:
                        _pack_data_into(arena, used, _CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, 8 + length, offset)
                    else:
                        _pack_simple_into(arena, used, _SIMPLE_MAGIC, 0, cookie)
                    used = end
            taken += 1
            turn.count -= 1
            if not turn.count:
                readers.end(turn)
        if taken:
            self._tasks -= taken
            self._in_flight -= taken * REQUEST_COST
            outbox.used = used
            self._flush()
            if self._paused or self._closing:
                self._after_tasks_soon()

    def slowly(self, read: Read) -> tuple[Segments, memoryview, Ended]:
        _, _, position, length, cookie, offset = read
        view = new_buffer(length)
        put = partial(self._put_data, cookie, offset, view)
        return [(position, length)], view, partial(self._read_ended, cookie, REQUEST_COST, put)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not length:
            self._put(self._reply(cookie, to_read=True))
            return
        segments = self._volume.segments(offset, length)
        in_order = absent = False
        if length >= SEND:
            in_order, self._read_to = offset == self._read_to, offset + length
            if not in_order:
                self._ahead_to = 0
            elif self._ahead_to:
                self._read_ahead()
            if self._all_cached(segments):
                if self._begins:
                    self._begin()
                self._put_segments(flags, cookie, offset, segments, self._outbox.put_range)
                return
            absent = not in_order and self._is_absent(segments)
        data = [segment for segment in segments if segment[0] != ZERO]
        view = new_buffer(sum(count for _, count in data))
        asked = absent and self._device.ask_disk(data, view)  # to be refused would have the kernel read on behind it
        done = not absent and length <= INLINE_READ and self._device.read_now(data, view)
        if done or (self._is_awaited and not in_order and self._readers.wait_for(data, view)):
            self._put_view(flags, cookie, offset, segments, view)
        else:
            put = partial(self._put_view, flags, cookie, offset, segments, view)
            self._read_slowly(cookie, length, data, view, put, not (in_order or asked))
            if in_order and not self._ahead_to:
                self._read_ahead()

    def _read_ahead(self) -> None:
        """Ask the disk for what comes behind the last large read. The kernel reads ahead in the data file, where what
        comes next in a volume may lie elsewhere.
        """
        start = max(self._ahead_to, self._read_to)
        stop = min(self._read_to + AHEAD, self._volume.size)
        while stop - start >= AHEAD_STEP and self._readers.prefetch(self._volume.segments(start, AHEAD_STEP)):
            start += AHEAD_STEP
        self._ahead_to = start

    def _all_cached(self, segments: list[tuple[int, int]]) -> bool:
        """All can be read when it is sent. False also where a part is little: one read of all of them is cheaper."""
        data = self._live.pool.data
        return all(start == ZERO or (length >= SEND and data.is_cached(start, length)) for start, length in segments)

    def _is_absent(self, segments: list[tuple[int, int]]) -> bool:
        """That not all of it is cached is why `_all_cached` said no."""
        return self._live.pool.data.knows_cached and all(start == ZERO or length >= SEND for start, length in segments)

    def _read_verified(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """As `_read`, of what has been compared with its checksums."""
        segments = self._volume.segments(offset, length)
        if all(position == ZERO for position, _ in segments):
            self._read(flags, cookie, offset, length)
        else:
            self._start(_READ, cookie, length, self._read_checked(cookie, offset, length, segments))

    async def _read_checked(self, cookie: int, offset: int, length: int, segments: list[tuple[int, int]]) -> None:
        view = new_buffer(length)
        await self._device.read_checked(offset, segments, view)
        self._put_data(cookie, offset, view)

    def _read_slowly(
        self,
        cookie: int,
        length: int,
        data: list[tuple[int, int]],
        view: memoryview,
        put: Callable[[], None],
        ask: bool,
    ) -> None:
        """`put` the reply when `view` has `data`. No task: it would cost a cold read as much as the system calls do."""
        cost = max(length, REQUEST_COST)
        self._device.read(data, view, partial(self._read_ended, cookie, cost, put), ask)
        self._tasks += 1
        self._in_flight += cost

    def _read_ended(self, cookie: int, cost: int, put: Callable[[], None], error: Exception | None) -> None:
        if error is None:
            put()
        else:
            self._fail(_READ, cookie, error)
        self._ended(cost)

    def _put_header(self, cookie: int, offset: int, length: int) -> None:
        """Of a READ's reply that has all of its data behind it."""
        if self._structured:
            self._put(transmission.data_chunk_header(cookie, offset, length, True))
        else:
            self._put(_simple(0, cookie))

    def _put_data(self, cookie: int, offset: int, data: memoryview) -> None:
        """A READ's whole reply."""
        self._put_header(cookie, offset, len(data))
        self._put(data)

    def _put_view(
        self, flags: int, cookie: int, offset: int, segments: list[tuple[int, int]], view: memoryview
    ) -> None:
        """The reply to a READ; `view` has the data of those segments that are no holes."""
        taken = 0

        def put_data(_: int, length: int) -> None:
            nonlocal taken
            self._put(view[taken : taken + length])
            taken += length

        self._put_segments(flags, cookie, offset, segments, put_data)

    def _put_segments(
        self,
        flags: int,
        cookie: int,
        offset: int,
        segments: list[tuple[int, int]],
        put_data: Callable[[int, int], None],
    ) -> None:
        """The reply to a READ: a chunk for each segment where there are holes and the client takes chunks.

        `put_data` puts what is not zero, by its position in the data file and its length, in order.
        """
        in_chunks = self._structured and not flags & _DF and any(position == ZERO for position, _ in segments)
        if not in_chunks:
            self._put_header(cookie, offset, sum(length for _, length in segments))
        for index, (position, length) in enumerate(segments):
            last = index == len(segments) - 1
            if position != ZERO:
                if in_chunks:
                    self._put(transmission.data_chunk_header(cookie, offset, length, last))
                put_data(position, length)
            elif in_chunks:
                self._put(transmission.hole_chunk(cookie, offset, length, last))
            else:
                self._put(bytes(length))
            offset += length

    def _write(self, flags: int, cookie: int, offset: int, payload: memoryview, owned: bool) -> None:
        """`owned`: `payload` may be kept."""
        try:
            done = not payload or self._device.write_now(offset, payload)
        except Exception as error:
            self._fail(_WRITE, cookie, error)
            return
        if done:
            self._written(flags, cookie)
        else:
            self._writes += 1
            if not owned:
                payload = memoryview(bytes(payload))
            self._start(_WRITE, cookie, len(payload), self._write_slowly(flags, cookie, offset, payload))

    def _written(self, flags: int, cookie: int) -> None:
        self._writes += 1
        if flags & _FUA:
            self._answer_durable(_WRITE, cookie)
            return
        outbox = self._outbox
        if outbox.begun:
            self._put(self._reply(cookie))
            return
        start = outbox.room(_SIMPLE_HEADER)
        _pack_simple_into(outbox.arena, start, _SIMPLE_MAGIC, 0, cookie)
        outbox.used = start + _SIMPLE_HEADER

    async def _write_slowly(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        await self._device.write(offset, payload, self)
        await self._succeed(flags, cookie)

    def _other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        """Everything but READ, WRITE, FLUSH and DISC."""
        work: Coroutine[object, object, None]
        if command == _TRIM:
            work = self._trim(flags, cookie, offset, length)
        elif command == _WRITE_ZEROES:
            work = self._write_zeroes(flags, cookie, offset, length)
        elif command == _CACHE:
            work = self._cache(cookie, offset, length)
        else:
            self._block_status(flags, cookie, offset, length)
            return
        self._start(command, cookie, 0, work)

    def _flush_volume(self, cookie: int, last: bool) -> None:
        """`last`: nothing has been received behind it."""
        server = self._server
        server.flushes_alone += 1
        self._live.flushes += 1
        self._alternations = self._alternations + 1 if self._writes == 1 else 0
        self._writes = 0
        if last and not self._tasks and server.flushes_alone > ALONE and self._live.commit_now():
            self._put(self._reply(cookie))
        else:
            self._answer_durable(_FLUSH, cookie)

    def _sync_early(self) -> None:
        """The write just answered will be followed by a flush, as all before it were: begin while that is on its way.

        Still one sync a flush; the flush then finds nothing left to do.
        """
        if self._server.flushes_alone > ALONE:
            with contextlib.suppress(PoolFailed):  # who asks is told
                self._live.commit_now()

    def _answer_durable(self, command: int, cookie: int) -> None:
        """Answer when all that was written before is durable. No task: it is what a flush costs beside the disk."""
        try:
            durable = self._live.durable()
        except Exception as error:
            self._fail(command, cookie, error)
            return
        if durable is None:
            self._put(self._reply(cookie))
            return
        self._tasks += 1
        self._in_flight += REQUEST_COST
        durable.add_done_callback(partial(self._durable, command, cookie))

    def _durable(self, command: int, cookie: int, durable: asyncio.Future[None]) -> None:
        error = durable.exception()
        if error is None:
            self._put(self._reply(cookie))
        else:
            assert isinstance(error, Exception)
            self._fail(command, cookie, error)
        self._ended(REQUEST_COST)

    async def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length and not self._device.trim_now(offset, length):
            await self._device.trim(offset, length, self)
        await self._succeed(flags, cookie)

    async def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        # Always fast: at most two subblocks are written, so FAST_ZERO asks for nothing that is not so anyway.
        allocate = bool(flags & _NO_HOLE)
        if length and (allocate or not self._device.zero_now(offset, length)):
            await self._device.write_zeroes(offset, length, allocate, self)
        await self._succeed(flags, cookie)

    async def _cache(self, cookie: int, offset: int, length: int) -> None:
        if length:
            await self._device.prefetch(offset, length)
        self._put(self._reply(cookie))

    async def _succeed(self, flags: int, cookie: int) -> None:
        if flags & _FUA:
            await self._live.commit()
        self._put(self._reply(cookie))

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        most = 1 if flags & _REQ_ONE else STATUS_EXTENTS
        subblock = self._live.pool.block_size // 16
        for index, (number, context) in enumerate(self._contexts):
            found = extents.status(self._volume.layer, context, offset, length, subblock, most)
            last = index == len(self._contexts) - 1
            self._put(transmission.block_status_chunk(cookie, number, found, last))

    # -- requests in work

    def _start(self, command: int, cookie: int, length: int, work: Coroutine[object, object, None]) -> None:
        cost = max(length, REQUEST_COST)
        self._tasks += 1
        self._in_flight += cost
        self._loop.create_task(self._run(command, cookie, cost, work))

    async def _run(self, command: int, cookie: int, cost: int, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except Exception as error:
            self._fail(command, cookie, error)
        self._ended(cost)

    def _ended(self, cost: int) -> None:
        self._tasks -= 1
        self._in_flight -= cost
        self._after_tasks_soon()

    def _after_tasks_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._after_tasks)

    def _after_tasks(self) -> None:
        """Once for all requests that ended in this turn of the loop."""
        self._flush_due = False
        self._flush()
        self._control_flow()
        self._maybe_close()

    # -- replies

    def _answer_error(self, command: int, cookie: int, error: int) -> None:
        self._put(self._reply(cookie, error, command == _READ))

    def _fail(self, command: int, cookie: int, error: Exception) -> None:
        """The one place where an error of a request becomes a reply."""
        if not isinstance(error, GivenUp):  # it gets no answer, so that a client that comes back sends it again
            self._answer_error(command, cookie, self._told(command, error))

    def _told(self, command: int, error: Exception) -> int:
        """What the client is told."""
        if not isinstance(error, OSError | Error):
            log.error("%s: a request failed: %s", self.peer, Command(command).name, exc_info=error)
        return _errno(error)


def _errno(error: Exception) -> int:
    """What a client is told."""
    if isinstance(error, OSError):
        return transmission.errno_of(error)
    if isinstance(error, NoSpace):
        return int(Errno.ENOSPC)
    return int(Errno.EPERM if isinstance(error, ReadOnly) else Errno.EIO)


def _enlarge(sock: socket.socket) -> None:
    """Room for large replies: a unix socket's buffer does not grow by itself, and TCP's only after some of them."""
    size = _send_buffer(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except OSError:  # not root: as much as everybody may have
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def _send_buffer(sock: socket.socket) -> int:
    if sock.family == socket.AF_UNIX:
        return UNIX_SEND_BUFFER
    try:
        return LOCAL_SEND_BUFFER if sock.getpeername()[0] == sock.getsockname()[0] else SEND_BUFFER
    except OSError:  # it has gone
        return SEND_BUFFER


def new_buffer(length: int) -> memoryview:
    """Memory with anything in it, taken from the system only where it is used."""
    return np.empty(length, dtype=np.uint8).data


def _peer_name(transport: asyncio.Transport) -> str:
    """`127.0.0.1:4711`, or the process at the other end of a unix socket."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return f"{peer[0]}:{peer[1]}"
    sock = transport.get_extra_info("socket")
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]
        command = Path(f"/proc/{pid}/comm").read_bytes().decode(errors="replace").strip()
        # The peer chose its name: nothing of it may reach a terminal or a log line as more than letters.
        return f"unix:pid {pid} ({''.join(each if each.isprintable() else '?' for each in command)})"
    except OSError:  # the process has ended, or is another user's
        return "unix"

"""What a connection has still to send, in order: bytes, and ranges of the data file that are read when they are sent.

It writes past the transport, which is only read from: a reply leaves with one system call in the turn that made it. A
range is the file's memory map, which only the kernel looks into: the page cache is copied into the socket, once. A unix
socket may get it without a copy (`sendfile`), where that is faster (ways.py): it points at the page cache until the
peer has read it, and until then the pool keeps those blocks from being anybody else's (lent.py). Punching a hole would
not do: where a page is part of a large folio, that zeroes it in place (seen with ext4 on 6.18).

What waits here, unsent, has entered the pool; of a peer that takes nothing for a while a copy waits instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from nbdthin.lent import Lent
from nbdthin.pool.live import LivePool
from nbdthin.units import KiB, MiB
from nbdthin.ways import Ways

MOST_BUFFERS: Final = 1024  # IOV_MAX
HIGH: Final = 1 * MiB  # bytes unsent from which on the peer is slow
LOW: Final = HIGH // 4  # and until which it stays so
PATIENCE = 1.0  # seconds without progress after which ranges are copied, so that freed blocks come free
PIECE: Final = 1 * MiB  # bytes sent at once: about 0.1 ms
ARENA: Final = 256 * KiB  # bytes of small replies that are laid out behind each other; a full queue of them

Buffer = bytes | bytearray | memoryview


class Range:
    """A part of the data file."""

    __slots__ = ("epoch", "lends", "length", "position", "taken")

    def __init__(self, position: int, length: int, lends: bool) -> None:
        self.position = position
        self.length = length
        self.lends = lends
        self.epoch = -1  # entered
        self.taken = False  # being copied


class Outbox:
    """`put` any number of replies, then `flush` them, in the same turn of the loop.

    `changed` is called when `slow` has changed, or all is sent that had to wait; `lost` when the socket refuses: then
    nothing more is sent.
    """

    def __init__(
        self,
        live: LivePool,
        fd: int,
        arena: memoryview,
        changed: Callable[[], None],
        lost: Callable[[OSError], None],
    ) -> None:
        """`fd` is a non-blocking stream socket. It is duplicated, and so stays open until `close`: a transport closes
        its own when it likes, and the event loop lets nobody else watch that. `arena` is ARENA bytes, for all outboxes
        of an event loop: what is laid out there is flushed before anybody else's turn.
        """
        self.pending = 0  # bytes put and not sent; those in the arena are not counted
        # Small replies, each whole, put by whoever lays them out here behind `used`: no memory to be had for each. They
        # leave before the others, which the protocol allows, as long as nothing is flushed within a reply.
        self.arena = arena
        self.used = 0  # bytes in the arena
        self.begun = 0  # bytes of the next reply that are sent already
        self.slow = False  # the peer does not take them
        self._live = live
        self._data = live.pool.data
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(fileno=os.dup(fd))
        self.fd = self._socket.fileno()
        self._lent: Lent | None = None
        if self._socket.family == socket.AF_UNIX:
            self._lent = Lent(self._socket)
            live.lenders.add(self._lent)
        self._ways = Ways()
        self._changed = changed
        self._lost = lost
        self._new: list[Buffer | Range] = []  # put since the last flush
        self._new_ranges = 0
        self._queue: deque[Buffer | Range] = deque()  # flushed before, and not sent
        self._watching = False
        self._timer: asyncio.TimerHandle | None = None
        self._progress = False  # since the timer began
        self._closed = False

    def put(self, reply: Buffer) -> None:
        """Not empty, and the outbox's from now on."""
        self._new.append(reply)
        self.pending += len(reply)

    def room(self, length: int) -> int:
        """Where in the arena to lay out a reply of `length` bytes, at most ARENA: at `used`, perhaps after a flush."""
        if self.used + length > ARENA:
            self.flush()
        return self.used

    def begin(self, magic: bytes) -> None:
        """Send the magic number of the next reply, where nothing is before it, to wake who waits for that.

        On a machine where processors sleep deeply, the client needs some 40 us to be there, and is when the rest comes.
        """
        if not (self.used or self.pending or self.begun or self._closed):
            with contextlib.suppress(OSError):  # the reply itself finds out
                self.begun = os.write(self.fd, magic)

    def put_range(self, position: int, length: int) -> None:
        """`length` bytes of the data file, which this turn of the loop has found to be those that were asked for."""
        self._new.append(Range(position, length, self._lent is not None and self._ways.lends_next(length)))
        self._new_ranges += 1
        self.pending += length

    def flush(self) -> None:
        new, used = self._new, self.used
        if used and not new and not self._queue and not self._closed:
            self._flush_arena(used)
            return
        if used:
            self.used = 0
            self.pending += used
            part = self.arena[:used]
            new.insert(0, bytes(part) if self._queue else part)
        elif not new:
            return
        self._new = []
        if self.begun:
            new[0] = memoryview(new[0])[self.begun :]  # type: ignore[arg-type]  # the header of a reply is no Range
            self.pending -= self.begun
            self.begun = 0
        if self._closed:
            self.pending = 0
            return
        self._live.publish()
        if not self._queue and not self._new_ranges and len(new) <= MOST_BUFFERS:
            sent = self._write(new)  # type: ignore[arg-type]  # there is no Range
            if self.pending:
                self._queue.extend(new)
                self._drop(sent)
                self._watch()
        else:
            ready = not self._queue
            self._queue.extend(new)
            if ready:
                self._send()
        if used and self._queue and self._is_arena(self._queue[0]):
            self._queue[0] = bytes(self._queue[0])  # type: ignore[arg-type]  # the arena is written over now
        if self._new_ranges:
            self._new_ranges = 0
            self._enter(new)
        if self.pending > HIGH:
            if not self.slow:
                self.slow = True
                self._changed()
        elif self.slow and not self.pending:  # what was put while the rest was sent kept it so
            self.slow = False
            self._loop.call_soon(self._changed)

    def _flush_arena(self, used: int) -> None:
        """Nothing but small replies, and nothing before them, as most of the time."""
        begun, self.used, self.begun = self.begun, 0, 0
        self._live.publish()
        try:
            sent = begun + os.write(self.fd, self.arena[begun:used])
        except BlockingIOError:
            sent = begun
        except OSError as error:
            self._fail(error)
            return
        if sent < used:
            self.pending += used - sent
            self._queue.append(bytes(self.arena[sent:used]))
            self._watch()
        elif self.slow:
            self.slow = False
            self._loop.call_soon(self._changed)

    def _is_arena(self, part: Buffer | Range) -> bool:
        return isinstance(part, memoryview) and part.obj is self.arena.obj

    def close(self) -> None:
        """Send nothing more, and let go of the socket."""
        self._closed = True
        self._new.clear()
        self._new_ranges = 0
        self.pending = self.used = 0
        for each in self._queue:
            if isinstance(each, Range):
                self._leave(each)
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.fd >= 0:
            self._unwatch()
            self.fd = -1
            if self._lent is None:
                self._socket.close()
            else:
                self._live.lenders.end(self._lent)

    def _fail(self, error: OSError) -> None:
        self.close()
        self._lost(error)

    # -- sending

    def _send(self) -> None:
        """As much as the socket takes."""
        while self._queue:
            head = self._queue[0]
            if isinstance(head, Range) and head.lends:
                wanted = self._ready(head, PIECE)
                sent = self._lend(head, wanted) if wanted else 0
            else:
                parts, wanted = self._next()
                sent = self._write(parts) if parts else 0
            if self._closed:
                return
            if not wanted:  # a copy is coming
                self._unwatch()
                return
            self._drop(sent)
            if sent < wanted:
                self._watch()
                return

    def _next(self) -> tuple[list[Buffer], int]:
        """What to send now, and its length, up to a range that is lent."""
        parts: list[Buffer] = []
        wanted = 0
        for each in self._queue:
            part: Buffer | None = each if not isinstance(each, Range) else None
            if isinstance(each, Range) and not each.lends:
                part = self._mapped(each, PIECE - wanted)
            if part is None:
                break
            parts.append(part)
            wanted += len(part)
            if wanted >= PIECE or len(parts) == MOST_BUFFERS:
                break
        return parts, wanted

    def _ready(self, each: Range, most: int) -> int:
        """How many of its next bytes can be sent; 0: they are not cached any more, and a copy is under way."""
        if each.taken:
            return 0
        length = min(each.length, most)
        if each.epoch < 0 or self._data.is_cached(each.position, length):
            return length
        self._take([each])
        return 0

    def _mapped(self, each: Range, most: int) -> memoryview | None:
        """Its next bytes; None: a copy is under way."""
        length = self._ready(each, most)
        part = self._data.mapped(each.position, length) if length else None
        if length and part is None:
            self._take([each])
        return part

    def _lend(self, each: Range, length: int) -> int:
        """Bytes that the socket took of the next `length`."""
        assert self._lent is not None
        try:
            sent = os.sendfile(self.fd, self._data.fd, each.position, length)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                self._fail(error)
                return 0
            sent = 0
        if sent:
            self._lent.add(each.position, sent)
            self.pending -= sent
        else:  # the disk failed, the file is shorter than it should be, or is of no such kind: reading it tells
            self._take([each])
        return sent

    def _write(self, parts: list[Buffer]) -> int:
        """Bytes that the socket took. Where it refuses, all is over: nothing is pending any more."""
        try:
            sent = os.writev(self.fd, parts)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno == errno.EFAULT:  # the disk failed: reading it in the other way tells
                self._take([next(each for each in self._queue if isinstance(each, Range) and not each.taken)])
            else:
                self._fail(error)
            return 0
        self.pending -= sent
        return sent

    def _drop(self, sent: int) -> None:
        """So many bytes at the head of the queue are sent."""
        queue = self._queue
        while sent:
            head = queue[0]
            if isinstance(head, Range):
                taken = min(sent, head.length)
                head.position += taken
                head.length -= taken
                if not head.length:
                    queue.popleft()
                    self._leave(head)
                sent -= taken
            elif sent < len(head):
                queue[0] = memoryview(head)[sent:]
                return
            else:
                sent -= len(head)
                queue.popleft()

    # -- waiting for the peer

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._loop.add_writer(self.fd, self._writable)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self.fd)

    def _writable(self) -> None:
        self._progress = True
        self._send()
        if not self._queue:
            self._unwatch()
        slow = self.slow and self.pending > LOW
        if slow != self.slow or not self.pending:
            self.slow = slow
            self._changed()

    # -- ranges that wait

    def _enter(self, new: list[Buffer | Range]) -> None:
        """What is left of them stays in place until it is sent."""
        for each in new:
            if isinstance(each, Range) and each.length and each.epoch < 0 and not self._closed:
                each.epoch = self._live.enter()
        if self._timer is None and self._queue:
            self._progress = False
            self._timer = self._loop.call_later(PATIENCE, self._look)

    def _leave(self, each: Range) -> None:
        if each.epoch >= 0:
            self._live.leave(each.epoch)
            each.epoch = -1

    def _look(self) -> None:
        """A peer that takes nothing must not keep freed blocks from being used again."""
        self._timer = None
        waiting = [each for each in self._queue if isinstance(each, Range) and not each.taken]
        if not waiting:
            return
        if not self._progress:
            self._take(waiting)
        self._progress = False
        self._timer = self._loop.call_later(PATIENCE, self._look)

    def _take(self, ranges: list[Range]) -> None:
        for each in ranges:
            each.taken = True
            if each.epoch < 0:
                each.epoch = self._live.enter()
        self._live.spawn(self._copy(ranges))

    async def _copy(self, ranges: list[Range]) -> None:
        for each in ranges:
            view: memoryview = np.empty(each.length, dtype=np.uint8).data
            try:
                await self._live.in_thread(self._data.read_into, view, each.position)
            except OSError as error:
                if not self._closed:
                    self._fail(error)
            if self._closed:
                return
            self._queue[self._queue.index(each)] = view
            self._leave(each)
        if not self._watching and self._queue:
            self._watch()

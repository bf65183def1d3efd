"""What a connection has still to send, in order: bytes, and ranges of the data file that are never copied.

It writes past the transport, which is only read from: a reply of a few bytes leaves with one system call in the turn
that made it, and a range goes from the page cache to the socket by `sendfile`, at a third of what copying it costs.

Zero copy means that the socket's queue points at pages of the data file until the peer has taken them. That is sound
because a freed block is punched before it is used again, which detaches those pages (DataFile.detaches): nobody sees
what somebody else writes there later. A write to the same place may show, as the read has not ended for its client.
What waits here, unsent, has entered the pool; a peer that takes nothing for a while is sent a copy instead.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import termios
from array import array
from collections import deque
from collections.abc import Callable

import numpy as np

from nbdthin.pool.live import LivePool
from nbdthin.units import MiB

MOST_BUFFERS = 1024  # IOV_MAX
HIGH = 1 * MiB  # bytes unsent from which on the peer is slow
LOW = HIGH // 4  # and until which it stays so
PATIENCE = 1.0  # seconds without progress after which ranges are copied, so that freed blocks come free

Buffer = bytes | bytearray | memoryview


class Range:
    """A part of the data file."""

    __slots__ = ("epoch", "length", "position", "taken")

    def __init__(self, position: int, length: int) -> None:
        self.position = position
        self.length = length
        self.epoch = -1  # entered
        self.taken = False  # being copied


class Outbox:
    """`put` any number of replies, then `flush` them, in the same turn of the loop.

    `changed` is called when `slow` has changed, or all is sent that had to wait; `lost` when the socket refuses: then
    nothing more is sent.
    """

    def __init__(self, live: LivePool, fd: int, changed: Callable[[], None], lost: Callable[[OSError], None]) -> None:
        """`fd` is a non-blocking stream socket. It is duplicated, and so stays open until `close`: a transport closes
        its own when it likes, and the event loop lets nobody else watch that.
        """
        self.pending = 0  # bytes put and not sent
        self.slow = False  # the peer does not take them
        self._live = live
        self._data = live.pool.data
        self._loop = asyncio.get_running_loop()
        self._fd = os.dup(fd)
        self._changed = changed
        self._lost = lost
        self._new: list[Buffer | Range] = []  # put since the last flush
        self._new_ranges = 0
        self._queue: deque[Buffer | Range] = deque()  # flushed before, and not sent
        self._watching = False
        self._timer: asyncio.TimerHandle | None = None
        self._progress = False  # since the timer began
        self._sent_ranges = False
        self._closed = False

    def put(self, reply: Buffer) -> None:
        """Not empty, and the outbox's from now on."""
        self._new.append(reply)
        self.pending += len(reply)

    def put_range(self, position: int, length: int) -> None:
        """`length` bytes of the data file, which this turn of the loop has found to be those that were asked for."""
        self._new.append(Range(position, length))
        self._new_ranges += 1
        self.pending += length

    def flush(self) -> None:
        new = self._new
        if not new:
            return
        self._new = []
        if self._closed:
            self.pending = 0
            return
        self._live.publish()
        if not self._queue and not self._new_ranges and len(new) <= MOST_BUFFERS:
            try:
                sent = os.writev(self._fd, new)  # type: ignore[arg-type]  # there is no Range
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._fail(error)
                return
            self.pending -= sent
            if self.pending:
                self._queue.extend(new)
                self._drop(sent)
                self._watch()
        else:
            ready = not self._queue
            self._queue.extend(new)
            if ready:
                self._send()
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

    @property
    def holds_pages(self) -> bool:
        """The peer has not taken all that was sent."""
        if self._closed or not self._sent_ranges:
            return False
        left = array("i", [0])
        fcntl.ioctl(self._fd, termios.TIOCOUTQ, left)
        return left[0] > 0

    def cut(self) -> None:
        """End the connection."""
        if not self._closed:
            self._fail(TimeoutError(errno.ETIMEDOUT, "it did not take what it asked for"))

    def close(self) -> None:
        """Send nothing more, and let go of the socket."""
        self._closed = True
        self._new.clear()
        self._new_ranges = 0
        self.pending = 0
        for each in self._queue:
            if isinstance(each, Range):
                self._leave(each)
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._unwatch()
            os.close(self._fd)
            self._fd = -1

    def _fail(self, error: OSError) -> None:
        self.close()
        self._lost(error)

    # -- sending

    def _send(self) -> None:
        """As much as the socket takes."""
        queue = self._queue
        try:
            while queue:
                head = queue[0]
                if not isinstance(head, Range):
                    sent = os.writev(self._fd, self._leading())
                    self.pending -= sent
                    self._drop(sent)
                elif head.taken:  # a copy is coming
                    self._unwatch()
                    return
                else:
                    self._send_range(head)
        except BlockingIOError:
            self._watch()
        except OSError as error:
            self._fail(error)

    def _leading(self) -> list[Buffer]:
        """What can be sent before the next range."""
        leading: list[Buffer] = []
        for each in self._queue:
            if isinstance(each, Range) or len(leading) == MOST_BUFFERS:
                break
            leading.append(each)
        return leading

    def _send_range(self, head: Range) -> None:
        sent = os.sendfile(self._fd, self._data.fd, head.position, head.length)
        if not sent:
            raise OSError(errno.EIO, f"{self._data.path} ends before {head.position + head.length}")
        if not self._sent_ranges:
            self._sent_ranges = True
            self._live.senders.add(self)
        self.pending -= sent
        head.position += sent
        head.length -= sent
        if not head.length:
            self._queue.popleft()
            self._leave(head)

    def _drop(self, sent: int) -> None:
        """So many bytes at the head of the queue, none of a range, are sent."""
        queue = self._queue
        while sent:
            head = queue[0]
            assert not isinstance(head, Range)
            if sent < len(head):
                queue[0] = memoryview(head)[sent:]
                return
            sent -= len(head)
            queue.popleft()

    # -- waiting for the peer

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._loop.add_writer(self._fd, self._writable)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self._fd)

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
            if isinstance(each, Range) and each.length and not self._closed:
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
            for each in waiting:
                each.taken = True
            self._live.spawn(self._copy(waiting))
        self._progress = False
        self._timer = self._loop.call_later(PATIENCE, self._look)

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

"""Reads that the page cache could not answer at once, and that nothing may wait for but themselves.

A read that was refused with RWF_NOWAIT has begun all the same: since Linux 5.10 the kernel starts to fetch what it
refuses (mm/filemap.c, filemap_get_pages). So when the loop has tried all the reads that one receive brought in, the
disk has all of them, and what is left is to learn when they are there. One thread waits for the oldest, by reading it;
when it comes back the loop takes with NOWAIT what has come by then, which is most of them: one hand-over for a batch of
reads, where a thread for each costs 80 us of it.

Nothing depends on what the kernel has begun: each read becomes the oldest, and is then read by a thread, which also
finds out why one does not come. Where the oldest keeps the disk busy for long, others are waited for beside it.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from functools import partial

from nbdthin.pool.data import NOWAIT, DataFile
from nbdthin.pool.threads import Ended, Threads

STALL = 0.002  # seconds after which another read is waited for beside those that have not come
MOST_STALLED = 8  # reads waited for at once: half of the threads
MISSES = 2  # reads in a row that have not come: the others have not, either


Segments = list[tuple[int, int]]  # as DataFile.read_segments takes them, at least one


class _Turn:
    """The reads that one turn of the loop brought: they have entered together."""

    __slots__ = ("count", "epoch")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.count = 0  # that have not ended


_Read = tuple[Segments, memoryview, Ended, _Turn]


class Readers:
    """One for a pool. While a read is here it has entered: blocks freed meanwhile are not reused."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        threads: Threads,
        data: DataFile,
        enter: Callable[[], int],
        leave: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._threads = threads
        self._data = data
        self._enter = enter
        self._leave = leave
        self._turn: _Turn | None = None  # of this one
        self._waiting: deque[_Read] = deque()  # begun, as far as the kernel does that
        self._due = False  # `_progress` will be called
        self._watched = 0  # reads that threads wait for
        self._stalled = 0  # of these, known not to come soon
        self._returned = False  # one did, since the timer began
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, segments: Segments, view: memoryview, ended: Ended) -> None:
        """Reading `segments` with NOWAIT was refused in this turn of the loop: fill `view`, then call `ended`, in a
        later one.
        """
        turn = self._turn
        if turn is None:
            turn = self._turn = _Turn(self._enter())
            if not self._due:
                self._due = True
                self._loop.call_soon(self._progress)
        turn.count += 1
        self._waiting.append((segments, view, ended, turn))

    def read(self, segments: Segments, view: memoryview, ended: Ended) -> None:
        """Have a thread do it: for what the kernel has not begun, and for what would take long to copy."""
        turn = _Turn(self._enter())
        turn.count = 1
        self._call(segments, view, partial(self._end, ended, turn))

    def _call(self, segments: Segments, view: memoryview, ended: Ended) -> None:
        try:
            self._threads.call(partial(self._data.read_segments, segments, view), ended)
        except RuntimeError as error:  # there is no thread, and none to be had
            self._loop.call_soon(ended, error)

    def close(self) -> None:
        """Those that have not come never will."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _progress(self) -> None:
        """Take what has come, again and again while more does; then have the oldest waited for."""
        self._due = False
        self._turn_over()
        if self._sweep():
            if self._waiting and not self._due:
                self._due = True
                self._loop.call_soon(self._progress)
        else:
            self._watch()

    def _turn_over(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and not turn.count:
            self._leave(turn.epoch)

    def _watch(self) -> None:
        """Have the oldest waited for, unless one that may come soon is."""
        if self._waiting and self._watched <= self._stalled and self._watched < MOST_STALLED:
            segments, view, ended, turn = self._waiting.popleft()
            self._watched += 1
            self._call(segments, view, partial(self._came, ended, turn))
        if (self._waiting or self._watched) and self._timer is None:
            self._returned = False
            self._timer = self._loop.call_later(STALL, self._look)

    def _came(self, ended: Ended, turn: _Turn, error: Exception | None) -> None:
        self._watched -= 1
        self._stalled = min(self._stalled, self._watched)
        self._returned = True
        self._end(ended, turn, error)
        if self._waiting and not self._due:
            self._due = True
            self._loop.call_soon(self._progress)

    def _end(self, ended: Ended, turn: _Turn, error: Exception | None) -> None:
        turn.count -= 1
        if not turn.count and turn is not self._turn:
            self._leave(turn.epoch)
        ended(error)

    def _sweep(self) -> bool:
        """Take what has come; False: none has."""
        waiting, preadv, fd = self._waiting, os.preadv, self._data.fd
        missed: list[_Read] = []
        before = len(waiting)
        while waiting and len(missed) < MISSES:
            segments, view, ended, turn = read = waiting.popleft()
            error: Exception | None = None
            try:
                position = segments[0][0]
                if len(segments) == 1 and position >= 0:  # the short way
                    if preadv(fd, (view,), position, NOWAIT) != len(view):
                        missed.append(read)
                        continue
                else:
                    self._data.read_segments(segments, view, NOWAIT)
            except BlockingIOError:
                missed.append(read)
                continue
            except Exception as raised:
                error = raised
            turn.count -= 1
            if not turn.count and turn is not self._turn:
                self._leave(turn.epoch)
            ended(error)
        waiting.extendleft(reversed(missed))
        return len(waiting) < before

    def _look(self) -> None:
        """Now and then, while some have not come."""
        self._timer = None
        if not self._returned:
            self._stalled = self._watched
        if self._waiting:
            self._sweep()
            self._waiting.rotate(-MISSES)  # those behind may have come before these
            self._watch()

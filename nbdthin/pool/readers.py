"""Reads that the page cache could not answer at once, and that nothing may wait for but themselves.

A read that was refused with RWF_NOWAIT has begun all the same: since Linux 5.10 the kernel starts to fetch what it
refuses (mm/filemap.c, filemap_get_pages). So when the loop has tried all the reads that one receive brought in, the
disk has all of them, and what is left is to learn when they are there. One thread waits for the oldest, by reading it;
when it comes back the loop takes with NOWAIT what has come by then, which is most of them: one hand-over for a batch of
reads, where a thread for each costs 80 us of it. What a client that is alone waits for, the loop itself does; and where
several speak and the disk is quick, it looks again in each turn: a thread that comes back has all of them wait for the
interpreter's lock.

Nothing depends on what the kernel has begun: each read becomes the oldest, and is then read by a thread, which also
finds out why one does not come. Where the oldest keeps the disk busy for long, others are waited for beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from nbdthin.pool.data import NOWAIT, DataFile
from nbdthin.pool.threads import Ended, Threads
from nbdthin.units import KiB

STALL: Final = 0.002  # seconds after which another read is waited for beside those that have not come
MOST_STALLED: Final = 8  # reads waited for at once: half of the threads
SWEPT: Final = 128 * KiB  # bytes of large reads that are taken in one turn of the loop
SWEPT_BESIDE: Final = 64 * KiB  # while others have small requests, which wait for no disk
BESIDE: Final = 0.01  # seconds since somebody else spoke
TAKEN: Final = 64 * KiB  # bytes of a read from the disk that the loop itself takes when they are there
QUICK: Final = 0.001  # seconds that such a read may take of the loop
MOST_ASKED: Final = 4  # calls of `prefetch` under way: a quarter of the threads
MISSES: Final = 2  # reads in a row that have not come: the others have not, either


Segments = list[tuple[int, int]]  # as DataFile.read_segments takes them, at least one


class Turn:
    """The reads that one turn of the loop brought: they have entered together."""

    __slots__ = ("count", "epoch")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.count = 0  # that have not ended


class Taker(Protocol):
    """Whose reads these are."""

    def take(self, waiting: deque[Read], missed: list[Read]) -> None:
        """Pop at least the first of `waiting`, which is its own, and then its own that follow; try to read each with
        NOWAIT, and answer it and count it out of its turn (`Readers.end` with the last), or append it to `missed`,
        until these are MISSES.
        """

    def slowly(self, read: Read) -> tuple[Segments, memoryview, Ended]:
        """For a thread: what it reads, to where, and what is then to be called, when it is counted out of its turn."""


Read = tuple[Turn, Taker, int, int, int, int]  # position and length, then two numbers that are the taker's own


class _Whole:
    """A read of any kind."""

    __slots__ = ("_data", "_ended", "_read_ended", "_segments", "_view")

    def __init__(
        self,
        data: DataFile,
        read_ended: Callable[[Ended, Turn, Exception | None], None],
        segments: Segments,
        view: memoryview,
        ended: Ended,
    ) -> None:
        self._data = data
        self._read_ended = read_ended
        self._segments = segments
        self._view = view
        self._ended = ended

    def take(self, waiting: deque[Read], missed: list[Read]) -> None:
        read = waiting.popleft()
        error: Exception | None = None
        try:
            self._data.read_segments(self._segments, self._view, NOWAIT)
        except BlockingIOError:
            missed.append(read)
            return
        except Exception as raised:
            error = raised
        self._read_ended(self._ended, read[0], error)

    def slowly(self, read: Read) -> tuple[Segments, memoryview, Ended]:
        return self._segments, self._view, self._ended


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
        self.turn: Turn | None = None  # of this one, if it has brought a read
        self.waiting: deque[Read] = deque()  # begun, as far as the kernel does that
        self._due = False  # `_progress` will be called
        self._watched = 0  # reads that threads wait for
        self._stalled = 0  # of these, known not to come soon
        self._returned = False  # one did, since the timer began
        self._timer: asyncio.TimerHandle | None = None
        self._beside_until = 0.0  # several clients speak, by time.monotonic
        self._small_until = 0.0  # one of them has small requests
        self._moved = 0.0  # when a read last came, or the first of them was begun
        self._asked = 0  # of the disk, by `prefetch`, and not answered yet
        self._took = QUICK  # seconds, the last time that up to TAKEN were waited for

    def begin_turn(self) -> Turn:
        """For the first read of this turn of the loop. Each read is counted in it, and appended to `waiting`."""
        turn = self.turn = Turn(self._enter())
        if not self.waiting:
            self._moved = time.monotonic()
        self._progress_soon()
        return turn

    def speaker_changed(self, small: bool) -> None:
        """Another client than the one before has spoken; `small`: and been answered at once."""
        self._beside_until = time.monotonic() + BESIDE
        if small:
            self._small_until = self._beside_until

    def expect(self, segments: Segments, view: memoryview, ended: Ended) -> None:
        """Reading `segments` with NOWAIT was refused in this turn of the loop: fill `view`, then call `ended`, in a
        later one.
        """
        turn = self.turn or self.begin_turn()
        turn.count += 1
        self.waiting.append((turn, _Whole(self._data, self._read_ended, segments, view, ended), 0, len(view), 0, 0))

    def read(self, segments: Segments, view: memoryview, ended: Ended, ask: bool) -> None:
        """Have a thread do it: for what the kernel has not begun, and for what would take long to copy. `ask` for all
        of it at once, and no more, where the kernel would do so for one part after the other, and read on.
        """
        turn = Turn(self._enter())
        turn.count = 1
        read = self._ask_and_read if ask and self._data.nowait else self._read
        self._call(partial(read, segments, view), partial(self._read_ended, ended, turn))

    def wait_for(self, segments: Segments, view: memoryview) -> bool:
        """Fill `view` in the loop itself, where the disk is quick; False: it is not, or fails.

        For a client that is alone, and waits for this: handing over to a thread and back takes as long as the disk. One
        that is quick no longer holds up the loop once: then a thread is asked until it is quick again.
        """
        if self._took >= QUICK or len(view) > TAKEN:
            return False
        try:
            self._read(segments, view)
        except OSError:
            return False
        return True

    def _ask_and_read(self, segments: Segments, view: memoryview) -> None:
        self._data.prefetch(segments)
        self._read(segments, view)

    def _read(self, segments: Segments, view: memoryview) -> None:
        begun = time.monotonic()
        self._data.read_segments(segments, view)
        if len(view) <= TAKEN:
            self._took = time.monotonic() - begun

    def prefetch(self, segments: Segments) -> bool:
        """Have a thread ask the disk for what will be read soon, and what goes wrong is for that read to find. False:
        not now, as who reads should not wait for many of these.
        """
        if self._asked == MOST_ASKED or not self._data.nowait:
            return False
        try:
            self._threads.call(partial(self._data.prefetch, segments), self._prefetched)
        except RuntimeError:  # there is no thread
            return False
        self._asked += 1
        return True

    def _prefetched(self, _: Exception | None) -> None:
        self._asked -= 1

    def _read_ended(self, ended: Ended, turn: Turn, error: Exception | None) -> None:
        turn.count -= 1
        if not turn.count:
            self.end(turn)
        ended(error)

    def _call(self, read: Callable[[], None], ended: Ended) -> None:
        try:
            self._threads.call(read, ended)
        except RuntimeError as error:  # there is no thread, and none to be had
            self._loop.call_soon(ended, error)

    def close(self) -> None:
        """Those that have not come never will."""
        self.waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _progress_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        """Take what has come, again and again while more does; then have the oldest waited for."""
        self._due = False
        turn, self.turn = self.turn, None
        if turn is not None and not turn.count:
            self._leave(turn.epoch)
        now = time.monotonic()
        if self._sweep(SWEPT_BESIDE if now < self._small_until else SWEPT):
            self._moved = now
            if self.waiting:
                self._progress_soon()
        elif now < self._beside_until and now < self._moved + QUICK and self._took < QUICK and self.waiting:
            self._progress_soon()
        else:
            self._watch()

    def _watch(self) -> None:
        """Have the oldest waited for, unless one that may come soon is."""
        if self.waiting and self._watched <= self._stalled and self._watched < MOST_STALLED:
            read = self.waiting.popleft()
            segments, view, ended = read[1].slowly(read)
            self._watched += 1
            self._call(partial(self._read, segments, view), partial(self._came, ended, read[0]))
        if (self.waiting or self._watched) and self._timer is None:
            self._returned = False
            self._timer = self._loop.call_later(STALL, self._look)

    def _came(self, ended: Ended, turn: Turn, error: Exception | None) -> None:
        self._watched -= 1
        self._stalled = min(self._stalled, self._watched)
        self._returned = True
        if self.waiting:
            self._progress_soon()  # first: what has come with it leaves with it
        self._read_ended(ended, turn, error)

    def end(self, turn: Turn) -> None:
        """All its reads so far have ended."""
        if turn is not self.turn:
            self._leave(turn.epoch)

    def _sweep(self, left: int) -> bool:
        """Take what has come, of large reads about `left` bytes; False: none has."""
        waiting = self.waiting
        missed: list[Read] = []
        before = len(waiting)
        while waiting and len(missed) < MISSES and left > 0:
            left -= waiting[0][3]
            waiting[0][1].take(waiting, missed)
        waiting.extendleft(reversed(missed))
        return len(waiting) < before

    def _look(self) -> None:
        """Now and then, while some have not come."""
        self._timer = None
        if not self._returned:
            self._stalled = self._watched
        if self.waiting:
            if self._sweep(SWEPT):
                self._progress_soon()
            self.waiting.rotate(-MISSES)  # those behind may have come before these
            self._watch()

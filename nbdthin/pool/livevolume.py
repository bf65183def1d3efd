"""A volume as all connections to it share it: what can be done at once, and what takes a thread or waits its turn.

What can be done at once, in the loop, the `..._now` functions do; they return False when the slow way must be taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdthin.errors import NoSpace
from nbdthin.pool import sums
from nbdthin.pool.data import NOWAIT
from nbdthin.pool.journal import FULL_DISK
from nbdthin.pool.layers import LEAF_SHIFT
from nbdthin.pool.readers import TAKEN
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.pool.threads import Ended
from nbdthin.pool.volume import Volume
from nbdthin.pool.waiting import PATIENT, Asker, GivenUp
from nbdthin.units import KiB, MiB

if TYPE_CHECKING:
    from nbdthin.pool.live import LivePool

INLINE_WRITE = 1 * MiB  # bytes; a larger write's copy would hold up the loop for longer than a hand-over costs
INLINE_ASK = 256 * KiB  # bytes; to ask the disk for them takes 0.1 to 0.2 ms, and a thread asks for more
COMING = 0.1  # seconds that a command waits for the rest of large writes that have begun
PIECE: Final = 16 * MiB  # bytes of volume that are gone over block by block in one turn of the loop: about 1 ms
DROPPED = 32  # leaves that are discarded at once where nothing is below: 0.1 ms
DISCARDING = 0.0005  # seconds that one discard may take of a turn of the loop before it lets others have theirs

Pieces = asyncio.Future[None]  # a large write that comes in piece by piece; done when it has ended


class LiveVolume:
    """A volume or snapshot as all connections to it share it."""

    def __init__(self, live: LivePool, volume: Volume) -> None:
        self.volume = volume
        self._live = live
        self._pool = live.pool
        self._shift = live.pool.block_size.bit_length() - 1
        # Blocks, first and last, of those who hold them or wait to, in the order in which they came.
        self._held: dict[asyncio.Future[None], tuple[int, int]] = {}
        self._gate: asyncio.Future[None] | None = None  # set while a command changes the volume
        self._coming: set[Pieces] = set()

    # -- reading

    def read_now(self, segments: list[tuple[int, int]], view: memoryview) -> bool:
        """Fill `view` from the page cache. OSError from the disk."""
        if not self._pool.data.nowait:
            return False
        try:
            self.volume.read_segments(segments, view, NOWAIT)
        except BlockingIOError:
            return False
        return True

    def ask_disk(self, segments: list[tuple[int, int]], view: memoryview) -> bool:
        """In place of `read_now`, where they are known not to be all cached: have the kernel begin what `read` waits
        for, and nothing else. False: that would take long, and is left to `read`.
        """
        if len(view) > INLINE_ASK:
            return False
        self._pool.data.prefetch(segments)
        return True

    def read(self, segments: list[tuple[int, int]], view: memoryview, ended: Ended, ask: bool) -> None:
        """Fill `view`, then call `ended` with None or an OSError. `segments` must be of this turn of the loop, in which
        `read_now`, if their length is at most TAKEN, has found that they are not all cached, or `ask_disk` was called.
        `ask`: where a thread does it, it asks the disk for all of it first.
        """
        if len(view) <= TAKEN and self._pool.data.nowait:
            self._live.readers.expect(segments, view, ended)
        else:
            self._live.readers.read(segments, view, ended, ask)

    async def read_checked(self, offset: int, segments: list[tuple[int, int]], view: memoryview) -> None:
        """Fill `view` with a range, zeroes too, after comparing it with its checksums; EIO where they differ.

        `segments` are those of `offset` on, and of this turn of the loop.
        """
        layer = self.volume.layer
        try:
            await self._live.in_thread(sums.read_checked, self._pool, layer, offset, segments, view)
        except sums.Damage as error:
            self._live.verifier.tell_damage(self.volume.name, layer, error)
            raise

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to have a range in its cache."""
        for start, count in _pieces(offset, length):
            await self._live.in_thread(self._pool.data.prefetch, self.volume.segments(start, count))

    # -- writing

    def begin_pieces(self, length: int) -> Pieces | None:
        """A write of `length` bytes will come in pieces (`write_now`), which find space for all of it; None: perhaps
        not. To be ended by `end_pieces`. A command on the volume waits for it, but not for long.
        """
        pool = self._pool
        if self._gate is not None or pool.journal_low:
            return None
        if not pool.allocator.has(self.volume.layer.number, (length >> self._shift) + 2):
            return None
        pieces: Pieces = asyncio.get_running_loop().create_future()
        self._coming.add(pieces)
        return pieces

    def end_pieces(self, pieces: Pieces) -> None:
        self._coming.discard(pieces)
        pieces.set_result(None)

    def write_small(self, offset: int, payload: memoryview, begins: Callable[[], None] | None = None) -> bool:
        """`Volume.write_small` where nobody else is at the volume; False: ask `write_now`."""
        if self._gate is not None or self._held or self._pool.failed is not None:
            return False
        return self.volume.write_small(offset, payload, begins)

    def write_now(self, offset: int, payload: memoryview, pieces: Pieces | None = None) -> bool:
        """Write what can be written without waiting. NoSpace is left to the slow way; OSError from the disk."""
        length = len(payload)
        if length > INLINE_WRITE or self._blocked(offset, length, pieces):
            return False
        volume = self.volume
        try:
            if volume.write_small(offset, payload):
                return True
            write = volume.reserve(offset, length)
        except NoSpace:
            return False
        except OSError as error:
            if error.errno in FULL_DISK:
                return False
            raise
        try:
            if write.reads and not self._pool.data.nowait:
                raise BlockingIOError
            write.perform(payload, NOWAIT)
        except OSError as error:
            volume.abandon(write)
            if isinstance(error, BlockingIOError) or error.errno in FULL_DISK:
                return False
            raise
        except BaseException:
            volume.abandon(write)
            raise
        volume.finish(write)
        return True

    async def write(self, offset: int, payload: memoryview, asker: Asker = PATIENT) -> None:
        """Write `payload`, which the caller leaves alone until this returns. Raises NoSpace, GivenUp or OSError.

        `asker` is told when the write waits for space, and gives it up by being gone when `space_came` is called.
        """
        work = partial(self._write_held, offset, payload)
        await self._holding(offset, len(payload), work, asker, len(payload))

    async def _holding(
        self,
        offset: int,
        length: int,
        work: Callable[[], Coroutine[object, object, None]],
        asker: Asker,
        payload: int = 0,
    ) -> None:
        """Do `work` while holding a range; where it finds no space, let go and try again when there may be some."""
        deadline: float | None = None
        full: NoSpace | None = None
        try:
            while not asker.gone:
                try:
                    async with self._hold(offset, length):
                        return await work()
                except NoSpace as error:
                    full = error  # no waiting in the handler: compiled, the error would be everybody's meanwhile
                with asker.waiting(payload):
                    deadline = await self._live.wait_for_space(self.volume.name, full, deadline)
            raise GivenUp
        finally:
            full = None  # its traceback has this frame, and that the payload: no collector should have to come

    async def _write_held(self, offset: int, payload: memoryview) -> None:
        self._pool.check_writable()
        write = self.volume.reserve(offset, len(payload))
        try:
            await self._live.in_thread(write.perform, payload)
        except BaseException as error:
            self.volume.abandon(write)
            if isinstance(error, sums.Damage):
                self._live.verifier.tell_damage(self.volume.name, self.volume.layer, error)
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise DiskFull("the file system under the pool is full") from error
            self._live.space_came()
            raise
        self.volume.finish(write)

    def trim_now(self, offset: int, length: int) -> bool:
        if length > self._at_once or self._pool.journal_low or self._blocked(offset, length):
            return False
        self.volume.trim(offset, length)
        self._live.blocks_freed()
        return True

    async def trim(self, offset: int, length: int, asker: Asker = PATIENT) -> None:
        """Raises NoSpace, where what is left of the journal is for other things, or GivenUp."""
        await self._holding(offset, length, partial(self._trim_held, offset, length), asker)

    async def _trim_held(self, offset: int, length: int) -> None:
        await self._by_leaves(offset, length, self.volume.trim)
        self._live.blocks_freed()

    @property
    def _at_once(self) -> int:
        """Bytes of the volume that may be discarded without looking at the time."""
        return self.volume.leaf_bytes * (DROPPED if self.volume.layer.parent is None else 1)

    async def _by_leaves(self, offset: int, length: int, discard: Callable[[int, int], None]) -> None:
        """`discard` a range whose blocks are held, and let the loop turn now and then."""
        begun = time.monotonic()
        for start, count in _pieces(offset, length, self._at_once):
            discard(start, count)
            if time.monotonic() - begun > DISCARDING:
                self._live.publish()  # of a large range there is more than one batch keeps
                await asyncio.sleep(0)
                begun = time.monotonic()

    def zero_now(self, offset: int, length: int) -> bool:
        """write_zeroes, without allocation, where nothing has to be written."""
        if length > self._at_once or self._pool.journal_low or self._blocked(offset, length):
            return False
        if self.volume.partial_zeroes(offset, length):
            return False
        self.volume.zero_whole(offset, length, False)
        self._live.blocks_freed()
        return True

    async def write_zeroes(self, offset: int, length: int, allocate: bool, asker: Asker = PATIENT) -> None:
        """Raises NoSpace, GivenUp or OSError."""
        await self._holding(offset, length, partial(self._zero_held, offset, length, allocate), asker)

    async def _zero_held(self, offset: int, length: int, allocate: bool) -> None:
        self._pool.check_writable()
        if allocate:
            await self._provision(offset, length)
        parts = self.volume.partial_zeroes(offset, length)
        self.volume.check_space(parts)
        for start, end in parts:
            await self._write_held(start, memoryview(bytes(end - start)))
        if allocate:
            for start, count in _pieces(offset, length):
                self._zero_whole(start, count, allocate)
                self._live.publish()
                await asyncio.sleep(0)
        else:
            await self._by_leaves(offset, length, self._zero_whole)
        self._live.blocks_freed()

    def _zero_whole(self, offset: int, length: int, allocate: bool = False) -> None:
        self._pool.check_writable()
        self.volume.zero_whole(offset, length, allocate)

    async def _provision(self, offset: int, length: int) -> None:
        """All of the range or nothing. Raises NoSpace."""
        self.volume.check_provision(offset, length)  # first: what is taken back is not free before the next commit
        provisioned: list[int] = []
        try:
            for start, count in _pieces(offset, length):
                provisioned += self.volume.provision(start, count)
                await asyncio.sleep(0)
        except BaseException:
            self.volume.unprovision(provisioned)
            raise

    # -- keeping writers apart

    def _blocked(self, offset: int, length: int, pieces: Pieces | None = None) -> bool:
        if self._gate is None and not self._held and self._pool.failed is None:  # as for most writes
            return False
        self._pool.check_writable()
        if self._gate is not None and pieces not in self._coming:
            return True
        return bool(self._earlier(*self._blocks(offset, length)))

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self._shift, max(offset, offset + length - 1) >> self._shift

    def _earlier(self, first: int, last: int) -> list[asyncio.Future[None]]:
        """Whom to wait for before using blocks `first` to `last`; they wait for those before them."""
        found = []
        for held in reversed(self._held):
            start, end = self._held[held]
            if start <= last and first <= end:
                found.append(held)
                if start <= first and last <= end:
                    break
        return found

    def _hold(self, offset: int, length: int) -> _Hold:
        return _Hold(self, self._blocks(offset, length))

    def hold_leaves(self, leaves: list[int]) -> _Hold:
        """Keep writers off all blocks of some leaves."""
        firsts = [leaf << LEAF_SHIFT for leaf in leaves]
        return _Hold(self, *((first, first + LEAF_BLOCKS - 1) for first in firsts))

    async def acquire(self, ranges: Sequence[tuple[int, int]]) -> list[asyncio.Future[None]]:
        """All at once, in one place of the order: who took them one by one could wait for one who waits for him."""
        while self._gate is not None:
            await asyncio.shield(self._gate)
        earlier = [other for first, last in ranges for other in self._earlier(first, last)] if self._held else []
        held: list[asyncio.Future[None]] = []
        for each in ranges:
            held.append(asyncio.get_running_loop().create_future())
            self._held[held[-1]] = each
        try:
            for other in earlier:
                await asyncio.shield(other)
        except BaseException:
            self.release(held)
            raise
        return held

    def release(self, held: list[asyncio.Future[None]]) -> None:
        for each in held:
            del self._held[each]
            each.set_result(None)

    def gated(self) -> AbstractAsyncContextManager[None]:
        """Nothing is being written inside: writes under way have ended, new ones wait."""
        return _Gated(self)

    async def close_gate(self) -> None:
        while self._gate is not None:
            await asyncio.shield(self._gate)
        self._gate = asyncio.get_running_loop().create_future()
        try:
            if self._coming:
                await asyncio.wait(self._coming, timeout=COMING)
                self._coming.clear()
            while self._held:
                await asyncio.shield(next(iter(self._held)))
        except BaseException:
            self.open_gate()
            raise

    def open_gate(self) -> None:
        gate, self._gate = self._gate, None
        assert gate is not None
        gate.set_result(None)


class DiskFull(NoSpace):
    """Not the pool: the file system under its data."""


class _Hold:
    __slots__ = ("_held", "_ranges", "_volume")

    def __init__(self, volume: LiveVolume, *ranges: tuple[int, int]) -> None:
        self._volume = volume
        self._ranges = ranges

    async def __aenter__(self) -> None:
        self._held = await self._volume.acquire(self._ranges)

    async def __aexit__(self, *_: object) -> None:
        self._volume.release(self._held)


class _Gated:
    __slots__ = ("_volume",)

    def __init__(self, volume: LiveVolume) -> None:
        self._volume = volume

    async def __aenter__(self) -> None:
        await self._volume.close_gate()

    async def __aexit__(self, *_: object) -> None:
        self._volume.open_gate()


def _pieces(offset: int, length: int, piece: int = PIECE) -> Iterator[tuple[int, int]]:
    """A range cut at multiples of `piece`, so that the loop can turn in between: (offset, length)."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset // piece + 1) * piece)
        yield offset, stop - offset
        offset = stop

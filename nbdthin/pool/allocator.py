"""Which physical blocks are free: one byte a block, never stored, rebuilt from the entries at load.

A block is free, used (an entry points to it), reserved (part of a layer's run, not yet used) or pending (freed, but the
commit that says so is not durable yet, or a read may still be under way). Block 0 holds the data file's header and is
never handed out, so that 0 in an entry means "no block".

`bytearray.find` is the search: 16 MiB of map in about 1 ms. A block is given its place in a run of blocks that is its
region's, so that what is written in any order lies in the order of the volume, for who reads it in order. What a region
has not written yet is not set aside: it is free, and used last.

Where there are no whole runs left, or limits, layers take runs as they come, shorter ones where they must. Everything
that is decided about space is decided there: limits shorten a run, and a pool that is nearly full grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdthin.errors import NoSpace, OverQuota

FREE: Final = 0
USED: Final = 1
PENDING: Final = 2
RESERVED: Final = 3
HEADER_BLOCKS: Final = 1
NEVER: Final = 1 << 60

FULL = "the pool is full (remove snapshots or volumes, trim what is not needed, or: nbdthin extend SIZE)"
KEPT = "what the pool has left is reserved for other volumes (remove or trim something, or: nbdthin extend SIZE)"


class Run:
    """Blocks set aside for one layer: `next` up to `end`."""

    __slots__ = ("end", "next")

    def __init__(self) -> None:
        self.next = self.end = 0


class Allocator:
    """Free space of a data file of `total` blocks, the header's included."""

    def __init__(self, total: int, run_blocks: int) -> None:
        self.total = total
        self.used = 0  # blocks that entries point to
        self.pending = 0  # freed, not yet free
        self._map = bytearray(total)
        self._map[:HEADER_BLOCKS] = bytes([USED]) * HEADER_BLOCKS
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._run = bytes(run_blocks)
        self._cursor = HEADER_BLOCKS
        self._regions = True  # there may be whole runs left
        self._runs: dict[int, Run] = {}  # layer number -> its run; only while it has blocks left
        # Of a layer: blocks that its quota leaves (raises OverQuota) and blocks kept for others; None: no limits.
        self.limits: Callable[[int], tuple[int, int] | None] = lambda _: None
        self.grow: Callable[[], bool] = lambda: False  # calls `extend` if it can
        self.grow_at = NEVER  # blocks in use at which it is called; it is when there is none left, too

    @property
    def region(self) -> int:
        """Blocks of a volume that belong beside each other, from a multiple of that on."""
        return len(self._run)

    @property
    def capacity(self) -> int:
        """Blocks that can hold data."""
        return self.total - HEADER_BLOCKS

    @property
    def free(self) -> int:
        """Blocks that a write could get now or after the next commit."""
        return self.capacity - self.used

    def allocate(self, layer: int, block: int = 0, near: int = 0) -> int:
        """A physical block for the volume's block number `block`, now used. Raises NoSpace.

        `near` is where its region says that it belongs (layers.near); 0: nothing of its region is there yet.
        """
        if self.used < self.grow_at and self.limits(layer) is None:
            found = near or self._start_region(block)
            if 0 < found < self.total and self._map[found] == FREE:
                self._map[found] = USED
                self.used += 1
                return found
        run = self._runs.get(layer)
        if run is None:
            run = self._take_run(layer)
            if run.end - run.next > 1:
                self._runs[layer] = run
        block = run.next
        run.next = block + 1
        if run.next == run.end:
            self._runs.pop(layer, None)
        self._map[block] = USED
        self.used += 1
        return block

    def _start_region(self, block: int) -> int:
        """Its place in a run of blocks that are all free; 0: there is none."""
        start = self._find_run()
        if start < 0:
            return 0
        self._cursor = start + self.region
        return start + block % self.region

    def _find_run(self) -> int:
        """A whole run; below 0: there is none, and until something comes free nobody goes over all of the map again."""
        start = self._find(self._run, self._cursor) if self._regions else -1
        self._regions = start >= 0
        return start

    def _find(self, free: bytes, start: int) -> int:
        """Where so many blocks in a row are free, from `start` on or before it; below 0: nowhere."""
        found = self._map.find(free, start)
        return found if found >= 0 else self._map.find(free, HEADER_BLOCKS, start + len(free))

    def _take_run(self, layer: int) -> Run:
        if self.used >= self.grow_at:
            self.grow()
        run = Run()
        length = self._run_length(layer)
        start = self._find_run() if length == self.region else self._find(bytes(length), self._cursor)
        if start < 0:
            if self._runs:
                self.drop_runs()
                return self._take_run(layer)
            length = 1
            start = self._find(b"\0", self._cursor)
            if start < 0:
                if self.grow():
                    return self._take_run(layer)
                raise NoSpace(FULL)
        self._map[start : start + length] = bytes([RESERVED]) * length
        self._cursor = start + length
        run.next, run.end = start, start + length
        return run

    def _run_length(self, layer: int) -> int:
        """Blocks that `layer` may be given in one piece. Raises NoSpace where the limits leave it none."""
        bounds = self.limits(layer)
        if bounds is None:
            return len(self._run)
        quota, kept = bounds
        left = self._at_hand - sum(run.end - run.next for run in self._runs.values()) - kept
        if left <= 0 and self._runs:
            self.drop_runs()
            left = self._at_hand - kept
        if left <= 0:
            if self.grow():
                return self._run_length(layer)
            raise NoSpace(KEPT if self._at_hand else FULL)
        return min(len(self._run), quota, left)

    @property
    def _at_hand(self) -> int:
        """Blocks that are free now, or in runs."""
        return self.capacity - self.used - self.pending

    def has(self, layer: int, count: int) -> bool:
        """`layer` gets `count` blocks, one after the other, as far as nobody else is quicker. False: perhaps not."""
        try:
            return count <= self._at_hand and self.limits(layer) is None
        except NoSpace:
            return False

    def check(self, layer: int, count: int) -> None:
        """Raises NoSpace where `layer` cannot get `count` blocks now, one after the other."""
        while True:
            quota, kept = (self.limits(layer) if count else None) or (NEVER, 0)
            if count > quota:
                raise OverQuota(f"{count} blocks are needed, and the volume's quota leaves {quota}")
            left = max(self._at_hand - kept, 0)
            if count <= left:
                return
            if not self.grow():
                raise NoSpace(f"{count} blocks are needed, {left} are free: " + (KEPT if kept else FULL))

    def drop_runs(self) -> None:
        for run in self._runs.values():
            self._map[run.next : run.end] = bytes(run.end - run.next)
        self._runs.clear()
        self._regions = True

    def drop_run(self, layer: int) -> None:
        """`layer` takes no more blocks: what is left of its run is free again."""
        run = self._runs.pop(layer, None)
        if run is not None:
            self._map[run.next : run.end] = bytes(run.end - run.next)
            self._regions = True

    def extend(self, total: int) -> None:
        """The pool has grown to `total` blocks."""
        assert total >= self.total
        # A new map: one that numpy looks into cannot be resized.
        self._map = self._map + bytes(total - self.total)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.total = total
        self._regions = True

    def discard(self, block: int) -> None:
        """An entry gave `block` up: pending until `release`."""
        assert self._map[block] == USED
        self._map[block] = PENDING
        self.used -= 1
        self.pending += 1

    def discard_many(self, blocks: npt.NDArray[np.uint64]) -> None:
        places = _places(blocks)
        assert (self._bytes[places] == USED).all()
        self._bytes[places] = PENDING
        self.used -= len(blocks)
        self.pending += len(blocks)

    def release(self, blocks: npt.NDArray[np.uint64]) -> None:
        """Pending `blocks` may be handed out again."""
        places = _places(blocks)
        assert (self._bytes[places] == PENDING).all()
        self._bytes[places] = FREE
        self._regions = True
        self.pending -= len(blocks)

    def hold(self, blocks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Make the free ones among `blocks` pending: they are freed, but not durably so. Returns them."""
        found: npt.NDArray[np.uint64] = blocks[self._bytes[blocks] == FREE]
        self._bytes[found] = PENDING
        self.pending += len(found)
        return found

    def hold_free(self, first: int, end: int) -> npt.NDArray[np.uint64]:
        """Make the free ones of blocks `first` to `end` - 1 pending, so that nobody takes them before `release`."""
        part = self._bytes[first:end]
        found = np.flatnonzero(part == FREE)
        part[found] = PENDING
        self.pending += len(found)
        return (found + first).astype(np.uint64)

    def claim(self, blocks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """At load: entries point to `blocks`. Returns those that lie outside the pool or are claimed already."""
        bad: npt.NDArray[np.uint64] = blocks[blocks >= self.total]
        if not len(bad):
            bad = blocks[self._bytes[blocks] != FREE]
        if not len(bad):
            bad = blocks[self._come_again(blocks)]
            self._bytes[blocks] = USED
            self.used += len(blocks)
        return bad

    def _come_again(self, blocks: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of `blocks` come again later in it; what the map says of them is lost.

        The map itself is the memory: each block is given a digit of its place in `blocks`, and asked for it again. Of
        two, the later one's stays. Places differ in some digit, so all are found, in time that grows with `blocks`
        alone: sorting them, or counting the whole map for each layer, took most of a load.
        """
        places = np.arange(len(blocks), dtype=np.uint64)
        again = np.zeros(len(blocks), dtype=np.bool_)
        for shift in range(0, len(blocks).bit_length(), 8):
            digits = (places >> np.uint64(shift)).astype(np.uint8)
            self._bytes[blocks] = digits
            again |= self._bytes[blocks] != digits
        return again

    def states(self) -> npt.NDArray[np.uint8]:
        """What each block is, runs counted as free; a copy."""
        copy = self._bytes.copy()
        copy[copy == RESERVED] = FREE
        return copy


def _places(blocks: npt.NDArray[np.uint64]) -> slice | npt.NDArray[np.intp]:
    """What to index the map with: blocks in a row, as what was written in one go has them, take no look at each."""
    if len(blocks):
        first, last = int(blocks[0]), int(blocks[-1])
        if last - first == len(blocks) - 1 and (blocks[1:] - blocks[:-1] == 1).all():
            return slice(first, last + 1)
    return blocks.view(np.intp)  # of any other type numpy makes this one first

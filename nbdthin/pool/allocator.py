"""Which physical blocks are free: one byte a block, never stored, rebuilt from the entries at load.

A block is free, used (an entry points to it), reserved (part of a layer's run, not yet used) or pending (freed, but the
commit that says so is not durable yet, or a read may still be under way). Block 0 holds the data file's header and is
never handed out, so that 0 in an entry means "no block".

`bytearray.find` is the search: 16 MiB of map in about 1 ms. Layers take runs of blocks, so that volumes written at the
same time stay contiguous each for itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nbdthin.errors import NoSpace

FREE, USED, PENDING, RESERVED = range(4)
HEADER_BLOCKS = 1


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
        self._runs: dict[int, Run] = {}  # layer number -> its run; only while it has blocks left

    @property
    def capacity(self) -> int:
        """Blocks that can hold data."""
        return self.total - HEADER_BLOCKS

    @property
    def free(self) -> int:
        """Blocks that a write could get now or after the next commit."""
        return self.capacity - self.used

    def allocate(self, layer: int) -> int:
        """A block for `layer`, now used. Raises NoSpace."""
        run = self._runs.get(layer)
        if run is None:
            run = self._take_run()
            if run.end - run.next > 1:
                self._runs[layer] = run
        block = run.next
        run.next = block + 1
        if run.next == run.end:
            self._runs.pop(layer, None)
        self._map[block] = USED
        self.used += 1
        return block

    def _take_run(self) -> Run:
        run = Run()
        length = len(self._run)
        start = self._map.find(self._run, self._cursor)
        if start < 0:
            start = self._map.find(self._run, HEADER_BLOCKS, self._cursor + length)
        if start < 0:
            if self._runs:
                self._drop_runs()
                return self._take_run()
            length = 1
            start = self._map.find(b"\0", HEADER_BLOCKS)
            if start < 0:
                raise NoSpace("the pool is full (remove snapshots or volumes, or trim what is not needed)")
        self._map[start : start + length] = bytes([RESERVED]) * length
        self._cursor = start + length
        run.next, run.end = start, start + length
        return run

    def _drop_runs(self) -> None:
        for run in self._runs.values():
            self._map[run.next : run.end] = bytes(run.end - run.next)
        self._runs.clear()

    def drop_run(self, layer: int) -> None:
        """`layer` takes no more blocks: what is left of its run is free again."""
        run = self._runs.pop(layer, None)
        if run is not None:
            self._map[run.next : run.end] = bytes(run.end - run.next)

    def discard(self, block: int) -> None:
        """An entry gave `block` up: pending until `release`."""
        assert self._map[block] == USED
        self._map[block] = PENDING
        self.used -= 1
        self.pending += 1

    def discard_many(self, blocks: npt.NDArray[np.uint64]) -> None:
        assert (self._bytes[blocks] == USED).all()
        self._bytes[blocks] = PENDING
        self.used -= len(blocks)
        self.pending += len(blocks)

    def release(self, blocks: npt.NDArray[np.uint64]) -> None:
        """Pending `blocks` may be handed out again."""
        assert (self._bytes[blocks] == PENDING).all()
        self._bytes[blocks] = FREE
        self.pending -= len(blocks)

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

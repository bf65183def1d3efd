"""Reading and writing one volume or snapshot.

All of it is synchronous. What a server needs to spread over threads is split in steps: `segments` says where bytes are,
and a write is `reserve` (decide and allocate), `Write.perform` (the only step that does I/O, safe in any thread) and
`finish` or `abandon`. Whoever lets time pass between the steps keeps others off the same blocks meanwhile (live.py).

Data goes to its block before the entry says so; until `finish`, a reserved block is known to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from nbdthin.errors import Invalid, NoSpace, ReadOnly
from nbdthin.pool import sums
from nbdthin.pool.data import FOLIO
from nbdthin.pool.extents import data_masks
from nbdthin.pool.layers import FULL, LEAF_MASK, LEAF_SHIFT, MIXED, SUBBLOCKS, ZERO_LEAF, Layer, is_mixed, near, words
from nbdthin.pool.records import LEAF_BLOCKS

if TYPE_CHECKING:
    from nbdthin.pool.livevolume import LiveVolume
    from nbdthin.pool.pool import Pool

ZERO: Final = -1  # the position of a segment that reads as zero
SUB_BITS: Final = 4  # 16 subblocks a block
JOURNAL_LOW = (
    "the file system of the pool's journal is full: what is left of the journal is kept for removing things "
    "(remove snapshots or volumes, trim, or free space there)"
)
_LARGE_RANGE = 4096  # leaves: beyond this many, a discard looks at the leaves that exist instead of all
_WORTH_NUMPY = 16  # blocks of one leaf from which on discarding them all at once is faster than one by one
_WORTH_LEAF = 128  # changed entries beyond which the whole leaf is put: one by one they take 2 us each


class Write:
    """A write that is decided and not yet done."""

    __slots__ = ("_edges", "_layer", "_runs", "_volume", "end", "entries", "fresh", "start")

    def __init__(self, volume: Volume, start: int, end: int) -> None:
        self._volume = volume
        self.start = start  # bytes of the volume, widened to what must be written whole
        self.end = end
        self.fresh: list[int] = []  # physical blocks allocated for it
        self.entries: list[tuple[int, int]] = []  # (block, entry) to put when the data is there
        self._runs: list[tuple[int, int]] = []  # (position, length) of physically contiguous parts, in order
        self._layer = volume.layer
        self._edges: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])

    def add_run(self, position: int, length: int) -> None:
        if self._runs and sum(self._runs[-1]) == position:
            last, so_far = self._runs[-1]
            self._runs[-1] = (last, so_far + length)
        else:
            self._runs.append((position, length))

    def set_edges(self, before: list[tuple[int, int]], after: list[tuple[int, int]]) -> None:
        """Segments to be read first: what surrounds the payload in subblocks that it covers in part."""
        self._edges = (before, after)

    @property
    def reads(self) -> bool:
        """`perform` has something to read first."""
        return bool(self._edges[0] or self._edges[1])

    def perform(self, payload: memoryview, flags: int = 0) -> None:
        """The I/O. With NOWAIT, BlockingIOError before anything is written when an edge is not cached."""
        data = self._volume.pool.data
        if not self.reads:
            buffers = payload
        else:
            joined = bytearray(self.end - self.start)
            view = memoryview(joined)
            lead = sum(length for _, length in self._edges[0])
            self._read_edge(self.start, self._edges[0], view[:lead], flags)
            view[lead : lead + len(payload)] = payload
            behind = lead + len(payload)
            self._read_edge(self.start + behind, self._edges[1], view[behind:], flags)
            buffers = view
        done = 0
        for position, length in self._runs:
            data.write(buffers[done : done + length], position)
            done += length

    def _read_edge(self, offset: int, segments: list[tuple[int, int]], view: memoryview, flags: int) -> None:
        """Where data is verified, damage must not become a part of what is written; that takes its time."""
        pool = self._volume.pool
        if not pool.policy.verify:
            self._volume.read_segments(segments, view, flags)
        elif flags:
            raise BlockingIOError
        else:
            sums.read_checked(pool, self._layer, offset, segments, view)


class Tail(NamedTuple):
    """A block that a volume's new end cuts, its data in place."""

    block: int
    entry: int  # to be put
    old: int  # the physical block that it frees, or 0
    fresh: int  # the one allocated for it, or 0


class Shrink:
    """A volume's smaller size, decided and not yet so.

    What lies behind the new end must read as zero when the volume grows again. Where the end cuts a subblock with data,
    what is kept of it has been written to a fresh place: a crash before the commit, or a refusal, changes nothing.
    """

    def __init__(self, volume: Volume, size: int, tail: Tail | None) -> None:
        self._volume = volume
        self._before = volume.size
        self._size = size
        self._tail = tail

    def finish(self) -> None:
        """Make it so; cannot fail."""
        volume, tail = self._volume, self._tail
        if tail is not None:
            volume.pool.put(volume.layer, tail.block, tail.entry)
            if tail.old:
                volume.pool.discard_block(tail.old)
        volume.discard_between(self._size, self._before)

    def abandon(self) -> None:
        if self._tail is not None and self._tail.fresh:
            self._volume.pool.give_back([self._tail.fresh])


class Volume:
    """A volume or snapshot that is open for I/O. `layer` and `size` follow what commands do to it."""

    __slots__ = (
        "_block_mask",
        "_data",
        "_shift",
        "_sub_mask",
        "_sub_shift",
        "layer",
        "live",
        "name",
        "pool",
        "read_only",
        "size",
    )

    def __init__(self, pool: Pool, name: str, layer: Layer, size: int, read_only: bool) -> None:
        self.pool = pool
        self._data = pool.data
        self.name = name
        self.layer = layer
        self.size = size
        self.read_only = read_only
        self.live: LiveVolume | None = None  # as a server's clients share it
        self._shift = pool.block_size.bit_length() - 1
        self._block_mask = pool.block_size - 1
        self._sub_shift = self._shift - SUB_BITS
        self._sub_mask = (1 << self._sub_shift) - 1

    def detach(self) -> None:
        """The name is gone: whoever still has this object can reach nothing through it."""
        self.layer = Layer(0, None)
        self.size = 0
        self.read_only = True

    # -- reading

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises Invalid outside the volume, OSError from the disk."""
        self._check_range(offset, length)
        result = bytearray(length)
        self.read_segments(self.segments(offset, length), memoryview(result))
        return bytes(result)

    def segments(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range's bytes are: (position in the data file or ZERO, length), neighbours joined."""
        result: list[tuple[int, int]] = []
        layer, shift, block_mask = self.layer, self._shift, self._block_mask
        last_position, last_length = -2, 0
        while length:
            block = offset >> shift
            within = offset & block_mask
            count = min(length, block_mask + 1 - within)
            entry = layer.effective(block >> LEAF_SHIFT)[block & LEAF_MASK]
            touched = (2 << ((within + count - 1) >> self._sub_shift)) - (1 << (within >> self._sub_shift))
            if not entry & touched and not is_mixed(entry):
                position = ZERO
            elif entry & touched == touched:
                position = (entry >> 32 << shift) + within
            else:  # more than one kind: go by the subblock
                count = min(count, self._sub_mask + 1 - (offset & self._sub_mask))
                sub = within >> self._sub_shift
                if entry >> sub & 1:
                    physical = entry >> 32
                else:
                    physical = layer.resolve(block)[sub] if is_mixed(entry) else 0
                position = (physical << shift) + within if physical else ZERO
            if (position == last_position == ZERO) or (last_position > 0 and position == last_position + last_length):
                last_length += count
                result[-1] = (last_position, last_length)
            else:
                last_position, last_length = position, count
                result.append((position, count))
            offset += count
            length -= count
        return result

    def locate(self, offset: int, length: int) -> int:
        """The position of a range that lies in one place of one block; below 0 where it does not."""
        within = offset & self._block_mask
        if not 0 < length <= self._block_mask + 1 - within:
            return -1
        block = offset >> self._shift
        layer = self.layer
        leaf = layer.effective_leaves.get(block >> LEAF_SHIFT)
        entry = (layer.effective(block >> LEAF_SHIFT) if leaf is None else leaf)[block & LEAF_MASK]
        first, last = within >> self._sub_shift, (within + length - 1) >> self._sub_shift
        touched = (2 << last) - (1 << first)
        if entry & touched == touched:
            return (entry >> 32 << self._shift) + within
        if is_mixed(entry):  # a small read mostly meets one of its blocks
            resolved = layer.mixed.get(block) or layer.resolve(block)  # without the call, mostly
            physical = resolved[first]
            if physical and (first == last or resolved[first : last + 1].count(physical) == last - first + 1):
                return (physical << self._shift) + within
        return -1

    def read_segments(self, segments: list[tuple[int, int]], view: memoryview, flags: int = 0) -> None:
        """Fill `view`. Flags as in DataFile.read_into."""
        self.pool.data.read_segments(segments, view, flags)

    # -- writing

    def write(self, offset: int, payload: bytes | bytearray | memoryview) -> None:
        """Write `payload` at `offset`. Raises Invalid, ReadOnly, NoSpace (nothing written) or OSError."""
        self._check_range(offset, len(payload))
        self._check_writable()
        if not payload:
            return
        write = self.reserve(offset, len(payload))
        try:
            write.perform(memoryview(payload))
        except BaseException:
            self.abandon(write)
            raise
        self.finish(write)

    def write_small(self, offset: int, payload: memoryview, begins: Callable[[], None] | None = None) -> bool:
        """Write what lies in one block and needs nothing read first, in as few steps as there can be.

        False: it is not so, or did not go well, and the mapping is as before: `write` has the errors, too. `begins` is
        called when all is decided, before the write itself.
        """
        shift, length = self._shift, len(payload)
        within = offset & self._block_mask
        last = within + length - 1
        if last >> shift or not 0 < length <= FOLIO:
            return False
        touched = (2 << (last >> self._sub_shift)) - (1 << (within >> self._sub_shift))
        layer, block = self.layer, offset >> shift
        own = layer.own.get(block >> LEAF_SHIFT)
        entry = 0 if own is None else own[block & LEAF_MASK]
        is_new = entry & touched != touched
        physical = entry >> 32
        fresh = 0
        if is_new:
            pool = self.pool
            if (offset | length) & self._sub_mask or pool.journal_low:
                return False
            if not physical:
                allocator = pool.allocator
                beside = 0 if own is None else near(own, block, allocator.region)
                try:
                    physical = fresh = allocator.allocate(layer.number, block, beside)
                except NoSpace:
                    return False
        if begins is not None:
            begins()
        data = self._data
        done = False
        try:
            done = data.pwrite(data.fd, payload, (physical << shift) + within) == length
        except OSError:
            return False
        finally:
            if fresh and not done:
                self.pool.give_back([fresh])
        if not done:
            return False
        data.dirty += length
        if is_new:
            pool.put(layer, block, physical << 32 | entry & ~(touched << 16) & 0xFFFFFFFF | touched)
        return True

    def reserve(self, offset: int, length: int) -> Write:
        """Decide a write of `length` > 0 bytes and allocate for it. Raises NoSpace with nothing changed."""
        layer, shift, sub_mask = self.layer, self._shift, self._sub_mask
        end = offset + length
        start, stop = offset, end
        if offset & sub_mask and not self._owns(offset):
            start = offset & ~sub_mask
        if end & sub_mask and not self._owns(end - 1):
            stop = (end | sub_mask) + 1
        write = Write(self, start, stop)
        write.set_edges(self.segments(start, offset - start), self.segments(end, stop - end))
        try:
            position = start
            while position < stop:
                block = position >> shift
                within = position & self._block_mask
                count = min(stop - position, self._block_mask + 1 - within)
                touched = (2 << ((within + count - 1) >> self._sub_shift)) - (1 << (within >> self._sub_shift))
                entry = layer.entry(block)
                physical = entry >> 32
                if entry & touched != touched:
                    if self.pool.journal_low:
                        raise NoSpace(JOURNAL_LOW)
                    if not physical:
                        beside = write.fresh[-1] + 1 if write.fresh else self._beside(block)
                        physical = self.pool.allocator.allocate(layer.number, block, beside)
                        write.fresh.append(physical)
                        layer.in_flight += 1
                    write.entries.append((block, physical << 32 | entry & ~(touched << 16) & 0xFFFFFFFF | touched))
                write.add_run((physical << shift) + within, count)
                position += count
        except NoSpace:
            self.abandon(write)
            raise
        return write

    def finish(self, write: Write) -> None:
        """The data is in place: let the entries say so."""
        for block, entry in write.entries:
            self.pool.put(self.layer, block, entry)
        self.layer.in_flight -= len(write.fresh)

    def abandon(self, write: Write) -> None:
        """The write failed: what was allocated for it goes back. Bytes that it overwrote in place are unspecified."""
        self.layer.in_flight -= len(write.fresh)
        self.pool.give_back(write.fresh)

    def _beside(self, block: int) -> int:
        """Where a physical block for `block` belongs; 0: anywhere."""
        own = self.layer.own.get(block >> LEAF_SHIFT)
        return 0 if own is None else near(own, block, self.pool.allocator.region)

    def _owns(self, offset: int) -> bool:
        """The subblock at `offset` is this layer's own data."""
        entry = self.layer.entry(offset >> self._shift)
        return bool(entry >> ((offset & self._block_mask) >> self._sub_shift) & 1)

    # -- discarding and zeroing

    def trim(self, offset: int, length: int) -> None:
        """Give back what the range holds; whole subblocks read as zero afterwards, parts of one keep their bytes."""
        self._check_range(offset, length)
        self._check_writable()
        self.pool.check_journal()
        self.discard(*self._inside(offset, offset + length))

    def write_zeroes(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make the range read as zero. With `allocate`, later writes to it cannot run out of space."""
        self._check_range(offset, length)
        self._check_writable()
        if allocate:
            self.provision(offset, length)
        parts = self.partial_zeroes(offset, length)
        self.check_space(parts)
        for start, end in parts:
            self.write(start, bytes(end - start))
        self.zero_whole(offset, length, allocate)

    def prepare_end(self, size: int) -> Shrink:
        """Get ready to end at `size`, below where it ends now. Raises NoSpace or OSError with nothing changed."""
        tail = self._copy_tail(size) if size & self._sub_mask and self._holds_data(size) else None
        return Shrink(self, size, tail)

    def discard_between(self, start: int, end: int) -> None:
        """Discard from the first subblock that begins at `start` or later to the one that holds the last byte."""
        self.discard(-(-start // self._subblock) * self._subblock, -(-end // self._subblock) * self._subblock)

    def _copy_tail(self, size: int) -> Tail:
        """Write what is kept of the subblock that `size` cuts, and zeroes behind it, where nothing points to yet."""
        start = size & ~self._sub_mask
        block, sub = size >> self._shift, (size & self._block_mask) >> self._sub_shift
        kept = self.read(start, size - start).ljust(self._subblock, b"\0")
        entry = self.layer.entry(block)
        old = entry >> 32
        moves = entry & FULL & ~(1 << sub) if entry >> sub & 1 else 0
        physical = old
        if not old or entry >> sub & 1:
            physical = self.pool.allocator.allocate(self.layer.number, block)
        try:
            for other in range(SUBBLOCKS):
                if moves >> other & 1:
                    within = other << self._sub_shift
                    buffer = memoryview(bytearray(self._subblock))
                    self.pool.data.read_into(buffer, (old << self._shift) + within)
                    self.pool.data.write(buffer, (physical << self._shift) + within)
            self.pool.data.write(memoryview(kept), (physical << self._shift) + (sub << self._sub_shift))
        except BaseException:
            if physical != old:
                self.pool.give_back([physical])
            raise
        low = entry & 0xFFFFFFFF & ~(1 << 16 + sub) | 1 << sub
        return Tail(block, physical << 32 | low, old if physical != old else 0, physical if physical != old else 0)

    def partial_zeroes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of subblocks that zeroing a range has to write, as they hold data: (start, end)."""
        end = offset + length
        start, stop = self._inside(offset, end)
        parts = ((offset, min(start, end)), (max(start, stop), end))
        return [(a, b) for a, b in parts if a < b and self._holds_data(a)]

    def check_space(self, parts: list[tuple[int, int]]) -> None:
        """Raises NoSpace where writing `parts`, each inside one block, needs more blocks than there are."""
        blocks = {start >> self._shift for start, _ in parts}
        self.pool.allocator.check(self.layer.number, sum(not self.layer.entry(block) >> 32 for block in blocks))

    def check_provision(self, offset: int, length: int) -> None:
        """Raises NoSpace where `provision` of the range would: a look at each leaf, not at each block."""
        if self.pool.journal_low:
            raise NoSpace(JOURNAL_LOW)
        first, end = offset >> self._shift, ((offset + length - 1) >> self._shift) + 1
        count = end - first
        for leaf in self._own_leaves(first >> LEAF_SHIFT, (end - 1) >> LEAF_SHIFT):
            base = leaf << LEAF_SHIFT
            part = words(self.layer.own[leaf])[max(first - base, 0) : end - base]
            count -= int(np.count_nonzero(part >> np.uint64(32)))
        self.pool.allocator.check(self.layer.number, count)

    def _own_leaves(self, first: int, last: int) -> list[int]:
        return [leaf for leaf in range(first, last + 1) if leaf in self.layer.own]

    def zero_whole(self, offset: int, length: int, allocate: bool) -> None:
        """Zero the subblocks that lie wholly in the range; with `allocate` their blocks stay provisioned."""
        self.pool.check_journal()
        start, stop = self._inside(offset, offset + length)
        if allocate and start < stop:
            self._zero_owned(start, stop)
        else:
            self.discard(start, stop)

    def _inside(self, offset: int, end: int) -> tuple[int, int]:
        """Start and end of the whole subblocks in a range; the volume's end counts as the end of one."""
        stop = -(-end // self._subblock) * self._subblock if end == self.size else end & ~self._sub_mask
        return -(-offset // self._subblock) * self._subblock, stop

    @property
    def _subblock(self) -> int:
        return self._sub_mask + 1

    def _holds_data(self, offset: int) -> bool:
        mask = self.layer.data_mask(offset >> self._shift)
        return bool(mask >> ((offset & self._block_mask) >> self._sub_shift) & 1)

    def discard(self, start: int, stop: int) -> None:
        """Make whole subblocks from byte `start` to `stop` read as zero, and free the blocks that empties."""
        if start >= stop:
            return
        size = self.leaf_bytes
        whole = range(-(-start // size), stop // size)
        if whole.start > whole.stop:
            self._discard_part(start, stop)
            return
        if start % size:
            self._discard_part(start, whole.start * size)
        leaves = self._leaves(whole.start, whole.stop - 1)
        if self.layer.parent is None:
            self.pool.drop_leaves(self.layer, [leaf for leaf in leaves if leaf in self.layer.own])
        else:
            for leaf in leaves:
                self._discard_part(leaf * size, (leaf + 1) * size)
        if stop % size:
            self._discard_part(whole.stop * size, stop)

    @property
    def leaf_bytes(self) -> int:
        """Bytes of the volume that one leaf maps."""
        return LEAF_BLOCKS << self._shift

    def _leaves(self, first: int, last: int) -> list[int] | range:
        if last - first < _LARGE_RANGE:
            return range(first, last + 1)
        found: set[int] = set()
        layer: Layer | None = self.layer
        while layer is not None:
            found.update(leaf for leaf in layer.own if first <= leaf <= last)
            layer = layer.parent
        return sorted(found)

    def _inherited(self, block: int) -> int:
        """The subblocks that the parents hold data for."""
        parent = self.layer.parent
        return 0 if parent is None else parent.data_mask(block)

    def _mask(self, block: int, start: int, stop: int) -> int:
        """The subblocks of `block` that lie in the range."""
        base = block << self._shift
        first = max(start - base, 0) >> self._sub_shift
        last = (min(stop - base, self._block_mask + 1) - 1) >> self._sub_shift
        return (2 << last) - (1 << first)

    def _discard_block(self, block: int, mask: int) -> None:
        inherited = self._inherited(block)
        entry = self.layer.entry(block)
        data = entry & FULL & ~mask
        zero = (entry >> 16 & FULL & ~mask) | (mask & inherited)
        physical = entry >> 32
        if physical and not data:
            self.pool.discard_block(physical)
            physical = 0
        if entry != (new := physical << 32 | zero << 16 | data):
            self.pool.put(self.layer, block, new)

    def _discard_part(self, start: int, stop: int) -> None:
        """`discard` of bytes that one leaf maps."""
        first, last = start >> self._shift, (stop - 1) >> self._shift
        leaf = first >> LEAF_SHIFT
        layer, parent = self.layer, self.layer.parent
        own = layer.own.get(leaf)
        if own is None and (parent is None or parent.effective(leaf) is ZERO_LEAF):
            return
        if last - first < _WORTH_NUMPY:
            for block in range(first, last + 1):
                self._discard_block(block, self._mask(block, start, stop))
            return
        part = slice(first & LEAF_MASK, (last & LEAF_MASK) + 1)
        entries = words(ZERO_LEAF if own is None else own)[part]
        mask = np.full(len(entries), FULL, dtype=np.uint64)
        mask[0], mask[-1] = self._mask(first, start, stop), self._mask(last, start, stop)
        data = entries & FULL & ~mask
        zero = entries >> np.uint64(16) & FULL & ~mask
        if parent is not None:
            zero |= mask & data_masks(parent, [leaf])[part]
        freed = (entries >> np.uint64(32) != 0) & (data == 0)
        new = np.where(freed, np.uint64(0), entries & MIXED) | zero << np.uint64(16) | data
        changed = np.flatnonzero(new != entries)
        if not len(changed):
            return
        self.pool.discard_blocks(entries[freed] >> np.uint64(32))
        result = ZERO_LEAF[:] if own is None else own[:]
        words(result)[part] = new
        if not words(result).any():
            self.pool.put_leaf(layer, leaf, None)
        elif len(changed) > _WORTH_LEAF:
            self.pool.put_leaf(layer, leaf, result)
        else:
            for index in changed.tolist():
                self.pool.put(layer, first + index, int(new[index]))

    def provision(self, offset: int, length: int) -> list[int]:
        """Give every block of the range a physical block. Raises NoSpace with nothing changed.

        Returns the blocks that had none, for `unprovision`.
        """
        if length:
            self.check_provision(offset, length)
        blocks = list(self._without_block(offset, length))
        for block in blocks:
            physical = self.pool.allocator.allocate(self.layer.number, block, self._beside(block))
            self.pool.put(self.layer, block, physical << 32 | self.layer.entry(block))
        return blocks

    def unprovision(self, blocks: list[int]) -> None:
        """Take back what `provision` gave, where nothing was written to it since."""
        for block in blocks:
            entry = self.layer.entry(block)
            if entry >> 32 and not entry & FULL:
                self.pool.discard_block(entry >> 32)
                self.pool.put(self.layer, block, entry & 0xFFFFFFFF)

    def _without_block(self, offset: int, length: int) -> Iterator[int]:
        """The blocks of a range that have no physical block of their own."""
        if length:
            for block in range(offset >> self._shift, ((offset + length - 1) >> self._shift) + 1):
                if not self.layer.entry(block) >> 32:
                    yield block

    def _zero_owned(self, start: int, stop: int) -> None:
        """`discard` for blocks that stay provisioned."""
        for block in range(start >> self._shift, ((stop - 1) >> self._shift) + 1):
            mask = self._mask(block, start, stop)
            inherited = self._inherited(block)
            entry = self.layer.entry(block)
            zero = (entry >> 16 & FULL & ~mask) | (mask & inherited)
            new = entry & MIXED | zero << 16 | entry & FULL & ~mask
            if new != entry:
                self.pool.put(self.layer, block, new)

    # -- refusals

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Invalid(f"{self.name!r} has {self.size} bytes: no {length} bytes at {offset}")

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly(f"{self.name!r} is a snapshot")
        self.pool.check_writable()

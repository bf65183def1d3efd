"""Checksums of sealed data: a record for each physical block, in one sparse file beside the journal (FORMAT.md).

A record (block, owner) with a sum for subblock s says: what layer `owner` shows in subblock s of the volume's block
that it keeps, or kept, in that physical block has this sum. What a sealed layer shows never changes, the number of a
layer whose seal is durable is never used again, and a block moves only between layers, at its place in the volume. So a
record is true for ever, whatever a crash takes back, as long as it was made for a layer whose seal was durable. It
*counts* where its owner is there, sealed, and has an entry that names this block with data in this subblock.

Therefore nothing orders the file with the journal, and nothing syncs it: what is lost, torn or of another owner means
"no sum yet", and is computed again. Nothing of it is kept in memory but which layers may lack sums (`todo`).

Heads have none. Every function here may be called from any thread; those that look at data want the pool entered
(`Pool.enter`), so that what is freed meanwhile is not used again before they are done.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from nbdthin.pool.files import Files, write_all
from nbdthin.pool.layers import FULL, LEAF_SHIFT, SUBBLOCKS, Layer, Words, words
from nbdthin.units import MiB

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool

RECORD = np.dtype(
    [
        ("owner", "<u8"),
        ("sums", "<u4", (SUBBLOCKS,)),
        ("mask", "<u2"),
        ("reserved", "<u2"),
        ("crc", "<u4"),
    ]
)
SIZE = RECORD.itemsize
PIECE = 1 * MiB  # bytes gone over at once
_CHECKED = SIZE - 4  # bytes that the record's own CRC is of
_PHYSICAL = np.uint64(32)

Records = npt.NDArray[np.void]
Masks = npt.NDArray[np.uint64]

log = logging.getLogger("nbdthin.pool")


def checksum(data: memoryview | bytes) -> int:
    """Of one subblock."""
    return xxh3_64_intdigest(data) & 0xFFFFFFFF


class Damage(OSError):
    """Data that is not what was written: EIO to whoever reads it."""

    def __init__(self, offset: int, length: int, position: int) -> None:
        super().__init__(errno.EIO, f"damaged data at {position}")
        self.offset = offset  # bytes of the volume, from the start of the subblock
        self.length = length
        self.position = position  # bytes of the data file


class Sums:
    """The file of records. Where it is missing it has been lost, and is made when the first record is written; an error
    there costs sums, and is logged once."""

    def __init__(self, path: Path, files: Files) -> None:
        self.todo: dict[int, None] = {}  # sealed layers that may lack sums
        self.touched: set[int] = set()  # layers that may have records
        self.distrusted: set[int] = set()  # layers whose records are of no worth, until they are made anew
        self.moving: set[int] = set()  # layers that a merge is taking sums from
        self._waits = False  # it lacked some of them before
        self.failed = False  # the last write did
        self._path = path
        self._files = files
        self._lock = threading.Lock()  # around reading, changing and writing a record
        self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self._fd = files.open(path, 0)

    def close(self) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    @property
    def exists(self) -> bool:
        return self._fd >= 0

    @property
    def empty(self) -> bool:
        return self._fd < 0 or not os.fstat(self._fd).st_size

    def read(self, blocks: Words) -> Records:
        """The records of some physical blocks, ascending; owner 0 for what is none."""
        return self._read(blocks)[0]

    def damaged(self, blocks: Words) -> int:
        """How many of the records of some physical blocks, ascending, are not what was written."""
        return self._read(blocks)[1]

    def _read(self, blocks: Words) -> tuple[Records, int]:
        records: Records = np.zeros(len(blocks), RECORD)
        damaged = 0
        if self._fd < 0:
            return records, damaged
        view = records.view(np.uint8).data
        for start, end in runs(blocks):
            with contextlib.suppress(OSError):
                os.preadv(self._fd, (view[start * SIZE : end * SIZE],), int(blocks[start]) * SIZE)
        crcs = records["crc"].tolist()
        for index in np.flatnonzero(records["crc"] | records["mask"]).tolist():
            if zlib.crc32(view[index * SIZE : index * SIZE + _CHECKED]) != crcs[index]:
                records[index : index + 1].view(np.uint8)[:] = 0
                damaged += 1
        return records, damaged

    def _write(self, blocks: Words, records: Records) -> None:
        view = records.view(np.uint8).data
        crcs = [zlib.crc32(view[index * SIZE : index * SIZE + _CHECKED]) for index in range(len(records))]
        records["crc"] = crcs
        try:
            if self._fd < 0:
                self._fd = self._files.open(self._path, os.O_CREAT)
            for start, end in runs(blocks):
                write_all(self._files, self._fd, view[start * SIZE : end * SIZE], int(blocks[start]) * SIZE)
        except OSError as error:
            if not self.failed:
                log.warning("checksums cannot be written (%s): %s", os.strerror(error.errno or 0), self._path)
            self.failed = True
        else:
            self.failed = False

    def add(self, owner: int, blocks: Words, masks: list[int], sums: npt.NDArray[np.uint32]) -> None:
        """Give blocks of `owner` the sums in `masks`. Those that they have stay: what they find stays found."""
        self.touched.add(owner)
        with self._lock:
            records = self.read(blocks)
            others = (records["owner"] != owner) | (owner in self.distrusted)
            records["owner"][others] = owner
            records["mask"][others] = 0
            wanted = np.array(masks, dtype=records["mask"].dtype)
            lacking = (wanted & ~records["mask"])[:, np.newaxis] >> np.arange(SUBBLOCKS) & 1 != 0
            records["sums"][lacking] = sums[lacking]
            records["mask"] |= wanted
            self._write(blocks, records)

    def begin_move(self, parent: int) -> None:
        """A step of a merge begins, one at a time: it may move sums to the child before it is given up."""
        self.moves_ended()
        self.moving = {parent}
        self._waits = parent in self.todo

    def moves_ended(self) -> None:
        """No step is under way: the parent of one that was given up lacks what had moved."""
        self.todo.update(dict.fromkeys(self.moving))
        self.moving.clear()

    def end_move(self, child: int) -> None:
        """The step is finished. What the parent lacked, or may have been given in its place, the child lacks."""
        if self._waits:
            self.todo[child] = None
        self.moving.clear()

    def reown(self, before: int, after: int, blocks: Words, masks: Masks) -> None:
        """Blocks of layer `before` are to be those of `after`, which shows of each the subblocks in its mask."""
        self.touched.add(after)
        order = np.argsort(blocks)
        blocks, masks = blocks[order], masks[order]
        with self._lock:
            records = self.read(blocks)
            found = (records["owner"] == before) & (records["mask"] & masks != 0)
            blocks, masks, records = blocks[found], masks[found], records[found]
            if len(blocks):
                records["owner"] = after
                records["mask"] &= masks.astype(np.uint16)
                self._write(blocks, records)

    def join(self, source: tuple[int, int, int], target: tuple[int, int, int], owner: int) -> None:
        """Subblocks have been copied between two blocks; the target is layer `owner`'s.

        Source and target are (physical block, owner so far, mask of what is taken from it or stays in it).
        """
        blocks = np.array([source[0], target[0]], dtype=np.uint64)
        with self._lock:
            origin, goal = self.read(blocks[:1])[0], self.read(blocks[1:])
            taken = source[2] & int(origin["mask"]) if origin["owner"] == source[1] else 0
            stays = target[2] & int(goal[0]["mask"]) if goal[0]["owner"] == target[1] else 0
            if not taken | stays:
                return
            for sub in _bits(taken):
                goal[0]["sums"][sub] = origin["sums"][sub]
            goal[0]["owner"], goal[0]["mask"] = owner, taken | stays
            self._write(blocks[1:], goal)


def runs(blocks: Words) -> list[tuple[int, int]]:
    """First index, and that behind the last, of each run of neighbours in an ascending array."""
    if not len(blocks):
        return []
    breaks = (np.flatnonzero(np.diff(blocks) != 1) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(blocks)], strict=True))


def _bits(mask: int) -> list[int]:
    return [sub for sub in range(SUBBLOCKS) if mask >> sub & 1]


class Piece:
    """Some blocks of one leaf of a sealed layer, by their place on disk."""

    def __init__(self, layer: Layer, blocks: Words, logical: Words, data: Masks) -> None:
        self.layer = layer
        self.blocks = blocks  # physical, ascending
        self.logical = logical
        self.data = data  # masks of the subblocks that hold data

    def __len__(self) -> int:
        return len(self.blocks)

    def part(self, which: slice | npt.NDArray[Any]) -> Piece:
        return Piece(self.layer, self.blocks[which], self.logical[which], self.data[which])

    def parts(self, most: int) -> Iterator[Piece]:
        """In parts of `most` blocks."""
        for start in range(0, len(self), most):
            yield self.part(slice(start, start + most))

    def still(self) -> npt.NDArray[np.bool_]:
        """Of each block: the layer's entry names it still."""
        pairs = zip(self.logical.tolist(), self.blocks.tolist(), strict=True)
        return np.array([self.layer.entry(logical) >> 32 == block for logical, block in pairs], dtype=np.bool_)


def leaf_of(layer: Layer, leaf: int) -> Piece:
    """The blocks with data of one leaf."""
    own = layer.own.get(leaf)
    entries = words(own) if own is not None else np.empty(0, dtype=np.uint64)
    index = np.flatnonzero(entries & FULL)
    order = np.argsort(entries[index] >> _PHYSICAL)
    index = index[order]
    entries = entries[index]
    logical: Words = index.astype(np.uint64) + np.uint64(leaf << LEAF_SHIFT)
    return Piece(layer, entries >> _PHYSICAL, logical, (entries & FULL).astype(np.uint64))


def showing(layer: Layer, block: int, sub: int) -> list[str]:
    """The volumes and snapshots that show subblock `sub` of a block as `layer` has it."""
    names = []
    todo = [layer]
    while todo:
        node = todo.pop()
        if node.name is not None:
            names.append(node.name)
        for child in node.children.values():
            entry = child.entry(block)
            if not (entry | entry >> SUBBLOCKS) >> sub & 1:
                todo.append(child)
    return sorted(names)


# -- computing


class Look:
    """Which blocks of a leaf lack sums? `run` reads their records; `found` are pieces of them."""

    def __init__(self, pool: Pool, layer: Layer, leaf: int) -> None:
        self._pool = pool
        self._piece = leaf_of(layer, leaf)
        self.found: list[Compute] = []

    def run(self) -> int:
        """Bytes that it has read."""
        piece = self._piece
        records = self._pool.sums.read(piece.blocks)
        have = np.where(records["owner"] == piece.layer.number, records["mask"], 0).astype(np.uint64)
        if piece.layer.number in self._pool.sums.distrusted:
            have[:] = 0
        missing = piece.data & ~have
        lacking = piece.part(missing != 0)
        lacking.data = missing[missing != 0]
        most = max(PIECE // self._pool.block_size, 1)
        self.found = [Compute(self._pool, part) for part in lacking.parts(most)]
        return len(piece) * SIZE


class Compute:
    """Compute the sums of a piece, up to 1 MiB of data."""

    def __init__(self, pool: Pool, piece: Piece) -> None:
        self._pool = pool
        self._piece = piece

    def run(self) -> int:
        """Bytes that it has read. What cannot be read gets no sum: a scrub tells of it."""
        pool, piece = self._pool, self._piece
        size = pool.block_size
        sub = size // SUBBLOCKS
        masks = [0] * len(piece)
        sums = np.zeros((len(piece), SUBBLOCKS), dtype=np.uint32)
        data = piece.data.tolist()
        read = 0
        for start, end in runs(piece.blocks):
            view = memoryview(bytearray((end - start) * size))
            read += len(view)
            try:
                pool.data.read_into(view, int(piece.blocks[start]) * size)
            except OSError:
                continue
            for index in range(start, end):
                masks[index] = data[index]
                base = (index - start) * size
                for each in _bits(data[index]):
                    sums[index, each] = checksum(view[base + each * sub : base + (each + 1) * sub])
        keep = piece.still() & (np.array(masks, dtype=np.uint64) != 0)
        if keep.any():
            kept = [mask for mask, each in zip(masks, keep.tolist(), strict=True) if each]
            pool.sums.add(piece.layer.number, piece.blocks[keep], kept, sums[keep])
        return read


def missing(pool: Pool) -> Iterator[Look | Compute]:
    """The work that gives every sealed layer its sums. Each piece is run before the next is asked for; ends early when
    writing fails. Layers may come, go and be merged between any two."""
    sums = pool.sums
    # Not of what is about to be merged away: the child that gets its blocks is there, or will be.
    while (number := next((each for each in sums.todo if each not in pool.state.mergeable), 0)) != 0:
        layer = pool.state.layers.get(number)
        if layer is None or not pool.is_sealed(layer):  # one whose seal is not durable yet comes again when it is
            del sums.todo[number]
            continue
        before = layer.changes
        for leaf in list(layer.own):
            look = Look(pool, layer, leaf)
            yield look
            for compute in look.found:
                yield compute
                if sums.failed:
                    return
        if layer.changes == before:  # else something was merged into it meanwhile
            sums.todo.pop(number, None)
            sums.distrusted.discard(number)


# -- checking


def counting(pool: Pool, records: Records, blocks: list[int], logical: list[int], below: int) -> list[int]:
    """Of each block: the mask of subblocks for which its record counts; owners from `below` on do not."""
    layers = pool.state.layers
    masks = []
    for owner, mask, block, place in zip(
        records["owner"].tolist(), records["mask"].tolist(), blocks, logical, strict=True
    ):
        layer = layers.get(owner) if owner < below and owner not in pool.sums.distrusted else None
        entry = layer.entry(place) if layer is not None and not layer.head else 0
        masks.append(mask & entry if entry >> 32 == block else 0)
    return masks


def differing(pool: Pool, view: memoryview, records: Records, masks: list[int], first: int) -> tuple[int, int] | None:
    """The first subblock whose sum is not that of `view`, as (index of the block, subblock); None: all is well.

    `view` starts at subblock `first` of the first block, and ends where it ends.
    """
    sub = pool.block_size // SUBBLOCKS
    for number in range(len(view) // sub):
        index, each = divmod(first + number, SUBBLOCKS)
        if masks[index] >> each & 1:
            if checksum(view[number * sub : (number + 1) * sub]) != records[index]["sums"][each]:
                return index, each
    return None


def read_checked(pool: Pool, layer: Layer, offset: int, segments: list[tuple[int, int]], view: memoryview) -> None:
    """Fill `view` with what `segments` of a volume have from `offset` on, zeroes too, where it is what was written.

    Whole subblocks are read and compared with what sums there are. `layer` is the volume's, as it was when `segments`
    were made: what may have been written since has no sum that counts. Raises Damage, or OSError from the disk.
    """
    below = layer.number if layer.head else layer.number + 1
    sub = pool.block_size // SUBBLOCKS
    done = 0
    for position, length in segments:
        part = view[done : done + length]
        if position <= 0:
            part[:] = bytes(length)
        else:
            lead = position % sub
            start, end = position - lead, -(-(position + length) // sub) * sub
            whole = part if end - start == length else memoryview(bytearray(end - start))
            pool.data.read_into(whole, start)
            _check(pool, below, offset + done - lead, start, whole)
            if whole is not part:
                part[:] = whole[lead : lead + length]
        done += length


def _check(pool: Pool, below: int, offset: int, position: int, view: memoryview) -> None:
    """Whole subblocks from `position` of the data file, `offset` of a volume. Raises Damage."""
    size = pool.block_size
    sub = size // SUBBLOCKS
    first, last = position // size, (position + len(view) - 1) // size
    blocks = list(range(first, last + 1))
    logical = list(range(offset // size, offset // size + len(blocks)))
    records = pool.sums.read(np.array(blocks, dtype=np.uint64))
    masks = counting(pool, records, blocks, logical, below)
    bad = differing(pool, view, records, masks, position % size // sub)
    if bad is not None:
        index, each = bad
        raise Damage(logical[index] * size + each * sub, sub, blocks[index] * size + each * sub)

"""Scrubbing: read the data of sealed layers from the disk, and compare it with its checksums.

Layers are gone over in the order of their numbers. Merging moves blocks to larger numbers only, so that what moves
meanwhile was compared before, or will be. A piece is `read` in a thread; `findings` are then of this moment's names.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nbdthin.errors import NotFound
from nbdthin.pool.data import DataFile
from nbdthin.pool.layers import SUBBLOCKS, Layer
from nbdthin.pool.rows import Finding
from nbdthin.pool.sums import PIECE, Piece, Records, checksum, counting, leaf_of, runs, showing

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool


class Reader:
    """Reads what the disk has, not what the page cache has of it.

    Directly where the file system can, else after dropping what is cached. Sealed data was synced before its seal was
    durable, so the disk has it; what a merge has just copied may still be dirty, but then a direct read writes it back
    first, and dropping leaves it. One thread at a time.
    """

    def __init__(self, data: DataFile, size: int) -> None:
        """`size` bytes at most are read at once."""
        self._data = data
        self._buffer = mmap.mmap(-1, size)  # aligned to a page, as direct reads want it
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(data.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Not before: a thread may be reading when nobody waits for it any more."""
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, position: int, length: int) -> memoryview:
        """Valid until the next read. OSError from the disk."""
        view = memoryview(self._buffer)[:length]
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # no direct reads here after all, or the disk refuses: see below
                if os.preadv(self._fd, (view,), position) == length:
                    return view
        os.posix_fadvise(self._data.fd, position, length, os.POSIX_FADV_DONTNEED)
        self._data.read_into(view, position)
        return view


class Check:
    """Some blocks of a sealed layer, up to 1 MiB."""

    def __init__(self, pool: Pool, piece: Piece, reader: Reader) -> None:
        self._pool = pool
        self._piece = piece
        self._reader = reader
        self._bad: list[tuple[int, int, bool]] = []  # index of the block, subblock, unreadable
        self.unsummed = 0  # bytes

    @property
    def bytes(self) -> int:
        return len(self._piece) * self._pool.block_size

    def read(self) -> None:
        pool, piece = self._pool, self._piece
        size = pool.block_size
        sub = size // SUBBLOCKS
        records = pool.sums.read(piece.blocks)
        blocks = piece.blocks.tolist()
        data = piece.data.tolist()
        counts = counting(pool, records, blocks, piece.logical.tolist(), pool.state.next_layer)
        self.unsummed = sum((mask & ~count).bit_count() for mask, count in zip(data, counts, strict=True)) * sub
        for start, end in runs(piece.blocks):
            try:
                view = self._reader.read(blocks[start] * size, (end - start) * size)
            except OSError:
                self._read_each(range(start, end))
                continue
            self._recount(records, counts, range(start, end))
            for index in range(start, end):
                sums = records[index]["sums"].tolist()
                for each in range(SUBBLOCKS):
                    begin = (index - start) * size + each * sub
                    if data[index] & counts[index] & 1 << each and checksum(view[begin : begin + sub]) != sums[each]:
                        self._bad.append((index, each, False))

    def _recount(self, records: Records, counts: list[int], indexes: range) -> None:
        """Behind a read: what a merge has given to a head meanwhile may have been overwritten before it was read."""
        part = slice(indexes.start, indexes.stop)
        blocks, logical = self._piece.blocks[part].tolist(), self._piece.logical[part].tolist()
        again = counting(self._pool, records[part], blocks, logical, self._pool.state.next_layer)
        for index, count in zip(indexes, again, strict=True):
            counts[index] &= count

    def _read_each(self, indexes: range) -> None:
        """Which subblocks cannot be read; those that can are compared."""
        size = self._pool.block_size
        sub = size // SUBBLOCKS
        records = self._pool.sums.read(self._piece.blocks[indexes.start : indexes.stop])
        for index in indexes:
            block = int(self._piece.blocks[index])
            record = records[index - indexes.start]
            for each in range(SUBBLOCKS):
                if not int(self._piece.data[index]) >> each & 1:
                    continue
                try:
                    view = self._reader.read(block * size + each * sub, sub)
                except OSError:
                    self._bad.append((index, each, True))
                    continue
                (count,) = counting(
                    self._pool,
                    records[index - indexes.start : index - indexes.start + 1],
                    [block],
                    [int(self._piece.logical[index])],
                    self._pool.state.next_layer,
                )
                if count >> each & 1 and checksum(view) != record["sums"][each]:
                    self._bad.append((index, each, False))

    def findings(self, names: Sequence[str]) -> Iterator[Finding]:
        """What is damaged, neighbours joined; named by one of `names` where it shows it. Nothing of what is gone."""
        size = self._pool.block_size
        sub = size // SUBBLOCKS
        last: Finding | None = None
        for index, each, unreadable in self._bad:
            block, logical = int(self._piece.blocks[index]), int(self._piece.logical[index])
            owner = self._owner(block, logical)
            if owner is None or (owner.head and not unreadable):  # a head may have overwritten it
                continue
            affected = tuple(showing(owner, logical, each))
            name = next((name for name in names if name in affected), affected[0] if affected else "")
            found = Finding(
                name, logical * size + each * sub, sub, block * size + each * sub, unreadable, affected=affected
            )
            joined = None if last is None else _joined(last, found)
            if last is not None and joined is None:
                yield last
            last = joined or found
        if last is not None:
            yield last

    def _owner(self, block: int, logical: int) -> Layer | None:
        """The layer that keeps the block now: a merge may have moved it up."""
        todo = [self._piece.layer]
        while todo:
            node = todo.pop()
            if self._pool.state.layers.get(node.number) is node and node.entry(logical) >> 32 == block:
                return node
            todo.extend(node.children.values())
        return None


def _joined(before: Finding, after: Finding) -> Finding | None:
    """Both as one, where they are neighbours."""
    length = before.length
    if (before.offset + length, before.position + length) != (after.offset, after.position):
        return None
    if (before.name, before.affected, before.unreadable) != (after.name, after.affected, after.unreadable):
        return None
    return Finding(
        before.name, before.offset, length + after.length, before.position, before.unreadable, before.affected
    )


class Scrub:
    """One scrub: of what `names` show, or of everything. Raises NotFound."""

    def __init__(self, pool: Pool, names: Sequence[str] = ()) -> None:
        self._pool = pool
        self.names = tuple(names)
        for name in names:
            if name not in pool.state.names:
                raise NotFound(f"no volume or snapshot {name!r} (`nbdthin ls` lists what there is)")
        self._reader = Reader(pool.data, max(PIECE, pool.block_size))
        self._layers = {layer.number for layer in self._below()}
        self.total = sum(layer.blocks for layer in self._wanted()) * pool.block_size  # bytes

    def _below(self) -> Iterator[Layer]:
        state = self._pool.state
        if not self.names:
            yield from state.layers.values()
        for name in self.names:
            node: Layer | None = state.layers[state.names[name].layer]
            while node is not None:
                yield node
                node = node.parent

    def _wanted(self) -> list[Layer]:
        layers = self._pool.state.layers
        return [layers[number] for number in sorted(self._layers & layers.keys()) if not layers[number].head]

    def checks(self) -> Iterator[Check]:
        """Each is read before the next is asked for; layers may come, go and be merged between any two."""
        most = max(PIECE // self._pool.block_size, 1)
        for layer in self._wanted():
            for leaf in list(layer.own):
                for piece in leaf_of(layer, leaf).parts(most):
                    yield Check(self._pool, piece, self._reader)

"""Which layer each part of a volume comes from, and how scattered it is in the data file.

Over a copy of the mapping's index, taken at once, so that what is made of it is the volume of one moment but for what
is written meanwhile; then in steps of bounded length, between which others run. A part of the picture, a cell, has a
power of two of subblocks: leaves hold whole cells, or cells whole leaves, and there are never more cells than asked
for.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nbdthin.errors import Invalid
from nbdthin.pool.layers import FULL, SUBBLOCKS, Layer, Words
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.pool.views import KINDS, MOST_CELLS, Cell, Map, Owner

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool
    from nbdthin.pool.volume import Volume

LEAVES = 16  # gone over at once: 0.1 to 0.2 ms for each layer that has them
INDEXED = 2048  # leaves noted at once
_LEAF_SUBBLOCKS = LEAF_BLOCKS * SUBBLOCKS
_ONE = np.uint16(1)

Masks = npt.NDArray[np.uint16]  # a bit a subblock
Numbers = npt.NDArray[np.int64]


def survey(pool: Pool, name: str, cells: int) -> Generator[None, None, Map]:
    """The map of a volume or snapshot in up to `cells` cells, step by step. Raises NotFound or Invalid."""
    volume = pool.volume(name)
    if not 1 <= cells <= MOST_CELLS:
        raise Invalid(f"a map has 1 to {MOST_CELLS} cells, not {cells}")
    return _Survey(volume, cells).steps()


class _Part:
    """Some leaves, and what is known of their blocks after some layers of the chain."""

    def __init__(self, leaves: list[int]) -> None:
        shape = (len(leaves), LEAF_BLOCKS)
        self.leaves = leaves
        self.rest = np.full(shape, FULL, dtype=np.uint16)  # subblocks that no layer has said anything of
        # Of each block, where its first and its last subblock are: the physical block, 0 for none, and whose it is.
        self.first, self.last = np.zeros(shape, dtype=np.uint32), np.zeros(shape, dtype=np.uint32)
        self.first_owner, self.last_owner = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        self._shown = np.zeros(shape, dtype=np.uint16)

    def show(self, place: int, which: slice | list[int], entries: Words) -> Masks:
        """The next layer of the chain, at `place`, has `entries` in some of the leaves: what it shows of them."""
        fields = entries.view(np.uint16).reshape(-1, LEAF_BLOCKS, 4)  # data, zeroes, physical block
        masks, rest = fields[:, :, 0], self.rest[which]
        data: Masks = masks & rest
        self.rest[which] = rest & ~(masks | fields[:, :, 1])
        self._shown[which] |= data
        physical = entries.view(np.uint32).reshape(-1, LEAF_BLOCKS, 2)[:, :, 1]
        for at, owners, bit in ((self.first, self.first_owner, 1), (self.last, self.last_owner, 1 << SUBBLOCKS - 1)):
            there = data & np.uint16(bit) != 0
            at[which] = np.where(there, physical, at[which])
            owners[which] = np.where(there, np.int32(place), owners[which])
        return data

    def highest(self) -> int | None:
        """The number of the subblock behind the last one with data."""
        for row in reversed(range(len(self.leaves))):
            blocks = np.flatnonzero(self._shown[row])
            if len(blocks):
                block = int(blocks[-1])
                mask = int(self._shown[row, block])
                return self.leaves[row] * _LEAF_SUBBLOCKS + block * SUBBLOCKS + mask.bit_length()
        return None


class _Survey:
    """One survey, of what the volume is now."""

    def __init__(self, volume: Volume, cells: int) -> None:
        self._name = volume.name
        self._kind = KINDS[volume.read_only]
        self._size = volume.size
        self._subblock = volume.pool.block_size // SUBBLOCKS
        self._count = -(-self._size // self._subblock)  # subblocks
        self._chain: list[tuple[Layer, dict[int, array[int]]]] = []
        node: Layer | None = volume.layer
        while node is not None:
            self._chain.append((node, node.own.copy()))
            node = node.parent
        self._found: dict[int, list[int]] = {}  # leaf -> the layers that have it, by their place in the chain
        self._cell = 1  # subblocks
        while -(-self._count // self._cell) > cells:
            self._cell *= 2
        self._owners = np.full(-(-self._count // self._cell), -1, dtype=np.int64)  # of each cell
        self._filled = np.zeros_like(self._owners)  # subblocks with data
        self._tally: Counter[int] = Counter()  # of the cell that is being gone over, where it has several leaves
        self._tallied = -1  # that cell
        self._data = np.zeros(len(self._chain), dtype=np.int64)  # subblocks, by layer
        self._runs = np.zeros(len(self._chain), dtype=np.int64)
        self._joined = 0  # places where data of two layers lies in one piece
        self._last = (-2, 0, 0)  # the leaf before, its last block's physical one and that one's layer
        self._highest = 0  # subblocks

    def steps(self) -> Generator[None, None, Map]:
        yield from self._index()
        leaves = sorted(self._found)
        for start in range(0, len(leaves), LEAVES):
            yield from self._go_over(leaves[start : start + LEAVES])
        return self._result()

    def _index(self) -> Generator[None, None, None]:
        """Which layers have which leaf: asking each layer for each leaf would take depth times as long."""
        last = (self._count - 1) // _LEAF_SUBBLOCKS
        noted = 0
        for place, (_, own) in enumerate(self._chain):
            for leaf in own:
                if leaf <= last:
                    self._found.setdefault(leaf, []).append(place)
                noted += 1
                if noted % INDEXED == 0:
                    yield

    def _go_over(self, leaves: list[int]) -> Generator[None, None, None]:
        """Some leaves, ascending."""
        part = _Part(leaves)
        self._cut(part)
        most = np.zeros((len(leaves), self._cells_of_leaf), dtype=np.int64)
        owners, filled = np.full_like(most, -1), np.zeros_like(most)
        counts: list[tuple[int, int, int]] = []  # leaf, place, subblocks
        for place in sorted({place for leaf in leaves for place in self._found[leaf]}):
            if not part.rest.any():  # the layers above hide the others
                break
            own = self._chain[place][1]
            rows = [row for row, leaf in enumerate(leaves) if leaf in own]
            entries = np.frombuffer(b"".join(own[leaves[row]] for row in rows), dtype=np.uint64)
            which = slice(None) if len(rows) == len(leaves) else rows
            data = part.show(place, which, entries)
            inside = self._by_cell(data)
            self._data[place] += int(inside.sum())
            self._runs[place] += int(np.bitwise_count(data & ~(data << _ONE)).sum())
            filled[which] += inside
            if self._cell > _LEAF_SUBBLOCKS:
                counts += [(leaves[row], place, count) for row, count in zip(rows, inside[:, 0].tolist(), strict=True)]
            else:
                more = inside > most[which]
                most[which] = np.where(more, inside, most[which])
                owners[which] = np.where(more, place, owners[which])
            yield
        self._join(part)
        if (highest := part.highest()) is not None:
            self._highest = highest
        if self._cell > _LEAF_SUBBLOCKS:
            self._add_up(sorted(counts))
        else:
            self._place_cells(leaves, owners, filled)

    def _cut(self, part: _Part) -> None:
        """Nothing lies behind the end."""
        base = part.leaves[-1] * _LEAF_SUBBLOCKS
        if base + _LEAF_SUBBLOCKS > self._count:
            block, sub = divmod(self._count - base, SUBBLOCKS)
            part.rest[-1, block] = (1 << sub) - 1
            part.rest[-1, block + 1 :] = 0

    @property
    def _cells_of_leaf(self) -> int:
        return max(_LEAF_SUBBLOCKS // self._cell, 1)

    def _by_cell(self, data: Masks) -> Numbers:
        """Subblocks with data of each leaf's cells: a row a leaf."""
        if self._cell >= SUBBLOCKS:
            parts = data.reshape(len(data), self._cells_of_leaf, -1)
        else:
            shifts = np.arange(0, SUBBLOCKS, self._cell, dtype=np.uint16)
            parts = data[:, :, np.newaxis] >> shifts & np.uint16((1 << self._cell) - 1)
            parts = parts.reshape(len(data), -1, 1)
        counts: Numbers = np.bitwise_count(parts).sum(axis=2, dtype=np.int64)
        return counts

    def _join(self, part: _Part) -> None:
        """Runs that go on from one block to the next were counted in each."""
        leaf, physical, owner = self._last
        first, last = part.first.ravel(), part.last.ravel()
        goes_on = np.empty(len(first), dtype=np.bool_)
        goes_on[1:] = (first[1:] == last[:-1] + 1) & (last[:-1] != 0)
        goes_on[0] = leaf + 1 == part.leaves[0] and physical != 0 and first[0] == physical + 1
        goes_on[(np.flatnonzero(np.diff(part.leaves) != 1) + 1) * LEAF_BLOCKS] = False
        before = np.concatenate((np.array([owner], dtype=np.int32), part.last_owner.ravel()[:-1]))
        same = goes_on & (before == part.first_owner.ravel())
        self._runs -= np.bincount(before[same], minlength=len(self._runs))
        self._joined += int(np.count_nonzero(goes_on)) - int(np.count_nonzero(same))
        self._last = (part.leaves[-1], int(last[-1]), int(part.last_owner[-1, -1]))

    def _place_cells(self, leaves: list[int], owners: Numbers, filled: Numbers) -> None:
        for row, leaf in enumerate(leaves):
            start = leaf * self._cells_of_leaf
            stop = min(start + self._cells_of_leaf, len(self._owners))
            self._owners[start:stop] = owners[row, : stop - start]
            self._filled[start:stop] = filled[row, : stop - start]

    def _add_up(self, counts: list[tuple[int, int, int]]) -> None:
        """Leaves of cells that have several, ascending."""
        for leaf, place, count in counts:
            cell = leaf * _LEAF_SUBBLOCKS // self._cell
            if cell != self._tallied:
                self._end_tally()
                self._tallied = cell
            self._tally[place] += count

    def _end_tally(self) -> None:
        total = self._tally.total()
        if total:
            self._owners[self._tallied] = self._tally.most_common(1)[0][0]
            self._filled[self._tallied] = total
        self._tally.clear()

    def _result(self) -> Map:
        self._end_tally()
        data, filled = self._data * self._subblock, self._filled * self._subblock
        highest = self._highest * self._subblock
        if highest > self._size:  # the end cuts the last subblock
            over = highest - self._size
            highest -= over
            filled[-1] -= over
            data[self._who_has(self._highest - 1)] -= over
        used = np.flatnonzero(data).tolist()
        places = {place: number for number, place in enumerate(used)}
        owners = [
            Owner(self._chain[place][0].number, self._chain[place][0].name, int(data[place]), int(self._runs[place]))
            for place in used
        ]
        cells = zip(self._owners.tolist(), filled.tolist(), strict=True)
        return Map(
            name=self._name,
            kind=self._kind,
            size=self._size,
            data=int(data.sum()),
            highest=highest,
            runs=int(self._runs.sum()) - self._joined,
            owners=tuple(owners),
            cell=self._cell * self._subblock,
            cells=tuple(Cell(places[owner], size) if size else Cell(None, 0) for owner, size in cells),
        )

    def _who_has(self, subblock: int) -> int:
        """The place in the chain of the layer whose data a subblock is."""
        block, sub = divmod(subblock, SUBBLOCKS)
        leaf, index = divmod(block, LEAF_BLOCKS)
        return next(place for place, (_, own) in enumerate(self._chain) if leaf in own and own[leaf][index] >> sub & 1)

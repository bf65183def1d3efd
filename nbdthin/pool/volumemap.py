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
_SIXTEEN, _THIRTY_TWO = np.uint64(16), np.uint64(32)

Numbers = npt.NDArray[np.int64]


def survey(pool: Pool, name: str, cells: int) -> Generator[None, None, Map]:
    """The map of a volume or snapshot in up to `cells` cells, step by step. Raises NotFound or Invalid."""
    volume = pool.volume(name)
    if not 1 <= cells <= MOST_CELLS:
        raise Invalid(f"a map has 1 to {MOST_CELLS} cells, not {cells}")
    return _Survey(volume, cells).steps()


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
        shape = (len(leaves), LEAF_BLOCKS)
        rest = np.full(shape, FULL, dtype=np.uint64)
        self._cut(leaves, rest)
        shown = np.zeros(shape, dtype=np.uint64)
        # Of each block, where its first and its last subblock are: the physical block, 0 for none, and whose it is.
        first, last = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        first_owner, last_owner = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        most = np.zeros((len(leaves), self._cells_of_leaf), dtype=np.int64)
        owners = np.full_like(most, -1)
        counts: list[tuple[int, int, int]] = []  # leaf, place, subblocks
        for place in sorted({place for leaf in leaves for place in self._found[leaf]}):
            own = self._chain[place][1]
            rows = [row for row, leaf in enumerate(leaves) if leaf in own and rest[row].any()]
            if not rows:
                continue
            entries = np.frombuffer(b"".join(own[leaves[row]] for row in rows), dtype=np.uint64)
            entries = entries.reshape(-1, LEAF_BLOCKS)
            data = entries & rest[rows]
            rest[rows] &= ~(entries | entries >> _SIXTEEN)
            shown[rows] |= data
            physical = (entries >> _THIRTY_TWO).astype(np.int64)
            begins, ends = data & 1 != 0, data >> np.uint64(SUBBLOCKS - 1) != 0
            first[rows] = np.where(begins, physical, first[rows])
            last[rows] = np.where(ends, physical, last[rows])
            first_owner[rows] = np.where(begins, place, first_owner[rows])
            last_owner[rows] = np.where(ends, place, last_owner[rows])
            self._data[place] += int(np.bitwise_count(data).sum())
            self._runs[place] += int(np.bitwise_count(data & ~(data << np.uint64(1))).sum())
            inside = self._by_cell(data)
            if self._cell > _LEAF_SUBBLOCKS:
                counts += [(leaves[row], place, count) for row, count in zip(rows, inside[:, 0].tolist(), strict=True)]
            else:
                more = inside > most[rows]
                most[rows] = np.where(more, inside, most[rows])
                owners[rows] = np.where(more, place, owners[rows])
            yield
        self._join(leaves, first, last, first_owner, last_owner)
        self._note_highest(leaves, shown)
        if self._cell > _LEAF_SUBBLOCKS:
            self._add_up(sorted(counts))
        else:
            self._place_cells(leaves, owners, self._by_cell(shown))
        yield

    def _cut(self, leaves: list[int], rest: Words) -> None:
        """Nothing lies behind the end."""
        base = leaves[-1] * _LEAF_SUBBLOCKS
        if base + _LEAF_SUBBLOCKS > self._count:
            block, sub = divmod(self._count - base, SUBBLOCKS)
            rest[-1, block] = (1 << sub) - 1
            rest[-1, block + 1 :] = 0

    @property
    def _cells_of_leaf(self) -> int:
        return max(_LEAF_SUBBLOCKS // self._cell, 1)

    def _by_cell(self, data: Words) -> Numbers:
        """Subblocks with data of each leaf's cells: a row a leaf."""
        if self._cell >= SUBBLOCKS:
            parts = data.reshape(len(data), self._cells_of_leaf, -1)
        else:
            shifts = np.arange(0, SUBBLOCKS, self._cell, dtype=np.uint64)
            parts = data[:, :, np.newaxis] >> shifts & np.uint64((1 << self._cell) - 1)
            parts = parts.reshape(len(data), -1, 1)
        counts: Numbers = np.bitwise_count(parts).sum(axis=2, dtype=np.int64)
        return counts

    def _join(
        self, leaves: list[int], first: Numbers, last: Numbers, first_owner: Numbers, last_owner: Numbers
    ) -> None:
        """Runs that go on from one block to the next were counted in each."""
        leaf, physical, owner = self._last
        ends = np.concatenate(([physical if leaf + 1 == leaves[0] else 0], last.ravel()[:-1]))
        owners = np.concatenate(([owner], last_owner.ravel()[:-1]))
        jumps = np.flatnonzero(np.diff(leaves) != 1) + 1
        ends[jumps * LEAF_BLOCKS] = 0
        goes_on = (ends != 0) & (first.ravel() == ends + 1)
        same = goes_on & (owners == first_owner.ravel())
        self._runs -= np.bincount(owners[same], minlength=len(self._runs))
        self._joined += int(np.count_nonzero(goes_on & ~same))
        self._last = (leaves[-1], int(last[-1, -1]), int(last_owner[-1, -1]))

    def _note_highest(self, leaves: list[int], shown: Words) -> None:
        places = np.flatnonzero(shown.ravel())
        if len(places):
            row, block = divmod(int(places[-1]), LEAF_BLOCKS)
            mask = int(shown[row, block])
            self._highest = leaves[row] * _LEAF_SUBBLOCKS + block * SUBBLOCKS + mask.bit_length()

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

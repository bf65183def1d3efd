"""Whose a place in the data file is: from what a disk says is bad to the volumes that have lost something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nbdthin.errors import Invalid
from nbdthin.pool import sums
from nbdthin.pool.layers import FULL, LEAF_SHIFT, SUBBLOCKS, Layer, words
from nbdthin.pool.views import Place

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool


def owners(pool: Pool, position: int, length: int) -> list[Place]:
    """The blocks that hold any of `length` bytes at `position` of the data file and are somebody's, in order.

    Goes over all that is mapped. Raises Invalid outside of the pool's data.
    """
    size = pool.block_size
    if position < 0 or length < 1 or position + length > pool.size:
        raise Invalid(f"the pool's data has {pool.size} bytes: no {length} bytes at {position}")
    first, last = position // size, (position + length - 1) // size
    found = []
    for layer in pool.state.layers.values():
        for block, entry in _between(layer, max(first, 1), last):
            found.append(_place(layer, block, entry, size))
    return sorted(found, key=lambda place: place.position)


def _between(layer: Layer, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Own entries, with their blocks, whose physical blocks are `first` to `last`; `first` is more than 0."""
    for leaf, entries in layer.own.items():
        physical = words(entries) >> np.uint64(32)
        for index in np.flatnonzero((physical >= first) & (physical <= last)).tolist():
            yield (leaf << LEAF_SHIFT) + index, entries[index]


def _place(layer: Layer, block: int, entry: int, size: int) -> Place:
    data = [sub for sub in range(SUBBLOCKS) if entry & FULL & 1 << sub]
    names = {name for sub in data for name in sums.showing(layer, block, sub)}
    return Place(
        position=(entry >> 32) * size,
        length=size,
        layer=layer.number,
        owner=layer.name,
        offset=block * size,
        data=len(data) * (size // SUBBLOCKS),
        shown_by=tuple(sorted(names)),
    )

"""Ranges instead of blocks: what BLOCK_STATUS says of a volume, and where two snapshots differ. Bytes throughout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from nbdthin.pool.layers import FULL, LEAF_SHIFT, SUBBLOCKS, ZERO_LEAF, Layer, Words, are_mixed, words
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.pool.rows import Extent

# base:allocation (NBD protocol, "Metadata querying")
HOLE = 1
ZERO = 2

LEAF_SUBBLOCKS = LEAF_BLOCKS * SUBBLOCKS
STATUS_LEAVES = 32  # leaves with entries that one answer looks at: 1 GiB of 64 KiB blocks; 0.3 to 1.2 ms
_WORTH_NUMPY = 16  # mixed blocks of a leaf from which on walking the layers for all at once is faster

Ranges = npt.NDArray[np.int64]  # a row for each: length, flags
Codes = npt.NDArray[np.uint8] | npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.int64]


def _bits(masks: Words) -> npt.NDArray[np.bool_]:
    """The low 16 bits of each mask, a flag a subblock."""
    return np.unpackbits(masks.astype(np.uint16).view(np.uint8), bitorder="little").view(np.bool_)


def data_masks(layer: Layer, leaves: Sequence[int]) -> Words:
    """The subblocks with data, a mask a block, of some leaves."""
    entries = np.concatenate([words(layer.effective(leaf)) for leaf in leaves])
    masks: Words = entries & np.uint64(FULL)
    mixed = np.flatnonzero(are_mixed(entries))
    if len(mixed):
        for number, leaf in enumerate(leaves):
            start, stop = np.searchsorted(mixed, (number << LEAF_SHIFT, number + 1 << LEAF_SHIFT)).tolist()
            found = mixed[start:stop]
            masks[found] = _mixed_masks(layer, leaf, found - (number << LEAF_SHIFT))
    return masks


def _mixed_masks(layer: Layer, leaf: int, mixed: npt.NDArray[np.intp]) -> Words:
    """`Layer.data_mask` of some blocks of a leaf."""
    if len(mixed) < _WORTH_NUMPY:
        return np.array([layer.data_mask((leaf << LEAF_SHIFT) + index) for index in mixed.tolist()], dtype=np.uint64)
    masks = np.zeros(len(mixed), dtype=np.uint64)
    rest = np.full(len(mixed), FULL, dtype=np.uint64)
    node: Layer | None = layer
    while node is not None:
        own = node.own.get(leaf)
        if own is not None:
            entries = words(own)[mixed]
            masks |= entries & rest
            rest &= ~(entries | entries >> np.uint64(16))
        node = node.parent
    return masks


def _allocation(layer: Layer, leaves: Sequence[int]) -> tuple[Codes, int]:
    zero = data_masks(layer, leaves) ^ np.uint64(FULL)
    own = np.concatenate([words(layer.own.get(leaf, ZERO_LEAF)) for leaf in leaves])
    # A zero in a block that is there already is no hole: writing it cannot run out of space.
    hole = np.where(own >> np.uint64(32) == 0, zero, np.uint64(0))
    if ((zero == 0) | (zero == FULL)).all():  # all of a block or nothing: a sixteenth of the work
        return ((zero != 0) * np.uint8(ZERO)) | ((hole != 0) * np.uint8(HOLE)), SUBBLOCKS
    return (_bits(zero) * np.uint8(ZERO)) | (_bits(hole) * np.uint8(HOLE)), 1


def _depth(layer: Layer, leaves: Sequence[int]) -> tuple[Codes, int]:
    return np.concatenate([_leaf_depth(layer, leaf) for leaf in leaves]), 1


def _leaf_depth(layer: Layer, leaf: int) -> npt.NDArray[np.uint32]:
    depths = np.zeros(LEAF_SUBBLOCKS, dtype=np.uint32)
    rest = np.full(LEAF_BLOCKS, FULL, dtype=np.uint64)
    node: Layer | None = layer
    depth = 1
    while node is not None and rest.any():
        own = node.own.get(leaf)
        if own is not None:
            entries = words(own)
            covered = rest & (entries | entries >> np.uint64(16))
            if covered.any():
                depths[_bits(covered)] = depth
                rest ^= covered
        node = node.parent
        depth += 1
    return depths


# What it says of subblocks without any entry; of leaves one behind the other, a code for each so many subblocks.
_CONTEXTS = {"base:allocation": (HOLE | ZERO, _allocation), "qemu:allocation-depth": (0, _depth)}


def status(layer: Layer, context: str, offset: int, length: int, subblock: int, most: int) -> Ranges:
    """What `context` says of a range, `length` > 0: at most `most` rows, neighbours different.

    The answer may end early: after `most` extents, or after STATUS_LEAVES leaves with entries.
    """
    empty, kind = _CONTEXTS[context]
    end = offset + length
    first, stop = offset // subblock, -(-end // subblock)
    starts: list[Numbers] = []  # of extents, in subblocks
    flags: list[Numbers] = []
    leaf, last = first // LEAF_SUBBLOCKS, (stop - 1) // LEAF_SUBBLOCKS
    count = looked = 0
    group = 1  # leaves gone over at once: few at first, for the client that wants to know of one extent only
    while leaf <= last:
        base = leaf * LEAF_SUBBLOCKS
        if looked == STATUS_LEAVES or count - len(starts) >= most:  # where parts meet, nothing may change
            end = base * subblock
            break
        leaves = list(takewhile(partial(_has_entries, layer), range(leaf, min(leaf + group, last + 1))))
        if leaves:
            codes, unit = kind(layer, leaves)
            skipped = max(first - base, 0) // unit
            codes = codes[skipped : -(-(stop - base) // unit)]
            changes = np.concatenate(([0], np.flatnonzero(codes[1:] != codes[:-1]) + 1))
            starts.append(base + (changes + skipped) * unit)
            flags.append(codes[changes].astype(np.int64))
            count += len(changes)
            looked += len(leaves)
            leaf += len(leaves)
            group = min(4 * group, STATUS_LEAVES - looked)
            if inside := count - len(starts):  # and no more than will probably do
                group = max(min(group, (most - count) * looked // inside), 1)
        else:
            starts.append(np.array([base]))
            flags.append(np.array([empty]))
            count += 1
            leaf = next((each for each in range(leaf + 1, last + 1) if _has_entries(layer, each)), last + 1)
    return _joined(np.concatenate(starts), np.concatenate(flags), offset, end, subblock)[:most]


def _has_entries(layer: Layer, leaf: int) -> bool:
    return leaf in layer.own or layer.effective(leaf) is not ZERO_LEAF


def _joined(starts: Numbers, flags: Numbers, offset: int, end: int, subblock: int) -> Ranges:
    """Extents from `offset` to `end`, bytes; neighbours that are alike become one."""
    differ = np.concatenate(([0], np.flatnonzero(flags[1:] != flags[:-1]) + 1))
    bounds = np.append(starts[differ] * subblock, end)
    bounds[0] = offset
    return np.stack((np.diff(bounds), flags[differ]), axis=1)


def diff(before: Layer, before_size: int, after: Layer, after_size: int, subblock: int) -> list[Extent]:
    """Where `after` may differ from `before`: what has an own entry on either way to the common ancestor."""
    ways = _ways(before, after)
    leaf_bytes = LEAF_SUBBLOCKS * subblock
    result: list[Extent] = []
    for leaf in sorted({leaf for layer in ways for leaf in layer.own}):
        changed = np.zeros(LEAF_BLOCKS, dtype=np.uint64)
        for layer in ways:
            own = layer.own.get(leaf)
            if own is not None:
                entries = words(own)
                changed |= (entries | entries >> np.uint64(16)) & FULL
        state = np.where(_bits(changed), np.where(_bits(data_masks(after, [leaf])), 2, 1), 0)
        starts = np.flatnonzero(np.diff(state, prepend=-1))
        for index, start in enumerate(starts.tolist()):
            if state[start]:
                stop = int(starts[index + 1]) if index + 1 < len(starts) else LEAF_SUBBLOCKS
                base = leaf * leaf_bytes
                _add(result, base + start * subblock, base + stop * subblock, bool(state[start] == 2))
    if before_size != after_size:
        result = _with_sizes(result, min(before_size, after_size), max(before_size, after_size), after_size)
    return _clip(result, max(before_size, after_size))


def _ways(before: Layer, after: Layer) -> list[Layer]:
    """The layers from each of the two up to, and without, their nearest common ancestor."""
    above = {}
    node: Layer | None = before
    while node is not None:
        above[node.number] = node
        node = node.parent
    way = []
    node = after
    while node is not None and node.number not in above:
        way.append(node)
        node = node.parent
    common = node
    node = before
    while node is not common:
        assert node is not None
        way.append(node)
        node = node.parent
    return way


def _add(result: list[Extent], start: int, stop: int, data: bool) -> None:
    if result and result[-1].data == data and result[-1].offset + result[-1].length == start:
        result[-1] = Extent(result[-1].offset, result[-1].length + stop - start, data)
    else:
        result.append(Extent(start, stop - start, data))


def _with_sizes(result: list[Extent], smaller: int, larger: int, after_size: int) -> list[Extent]:
    """One of the two ends earlier: what lies between the ends differs as a whole."""
    kept = _clip(result, smaller)
    behind = [extent for extent in result if extent.offset + extent.length > smaller and extent.data]
    position = smaller
    for extent in behind if after_size == larger else []:
        start = max(extent.offset, smaller)
        if start > position:
            _add(kept, position, start, False)
        position = extent.offset + extent.length
        _add(kept, start, position, True)
    if position < larger:
        _add(kept, position, larger, False)
    return kept


def _clip(result: list[Extent], end: int) -> list[Extent]:
    return [
        extent if extent.offset + extent.length <= end else Extent(extent.offset, end - extent.offset, extent.data)
        for extent in result
        if extent.offset < end
    ]

"""Ranges instead of blocks: what BLOCK_STATUS says of a volume, and where two snapshots differ. Bytes throughout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nbdthin.pool.layers import FULL, LEAF_SHIFT, MIXED, SUBBLOCKS, ZERO_LEAF, Layer, Words, words
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.pool.rows import Extent

# base:allocation (NBD protocol, "Metadata querying")
HOLE = 1
ZERO = 2

LEAF_SUBBLOCKS = LEAF_BLOCKS * SUBBLOCKS
STATUS_LEAVES = 32  # leaves with entries that one answer looks at: 1 GiB of 64 KiB blocks; about 2 ms
_BITS = np.arange(SUBBLOCKS, dtype=np.uint64)

Flags = npt.NDArray[np.uint32]
Ranges = list[tuple[int, int]]  # (length, flags)


def _bits(masks: Words) -> npt.NDArray[np.bool_]:
    """The low 16 bits of each mask, a flag a subblock."""
    return ((masks[:, None] >> _BITS) & np.uint64(1)).astype(np.bool_).reshape(-1)


def data_masks(layer: Layer, leaf: int) -> Words:
    """The subblocks with data, a mask a block, of one leaf."""
    entries = words(layer.effective(leaf))
    masks: Words = (entries & FULL).astype(np.uint64)
    for index in np.flatnonzero(entries >= MIXED).tolist():
        masks[index] = layer.data_mask((leaf << LEAF_SHIFT) + index)
    return masks


def _allocation(layer: Layer, leaf: int) -> Flags | int:
    own = layer.own.get(leaf)
    if own is None and layer.effective(leaf) is ZERO_LEAF:
        return HOLE | ZERO
    flags = np.where(_bits(data_masks(layer, leaf)), np.uint32(0), np.uint32(HOLE | ZERO))
    if own is not None:  # a zero in a block that is there already: writing it cannot run out of space
        present = np.repeat(words(own) >> np.uint64(32) != 0, SUBBLOCKS)
        flags[(flags != 0) & present] = ZERO
    return flags


def _depth(layer: Layer, leaf: int) -> Flags | int:
    if layer.effective(leaf) is ZERO_LEAF:
        return 0
    depths = np.zeros(LEAF_SUBBLOCKS, dtype=np.uint32)
    open_ = np.ones(LEAF_SUBBLOCKS, dtype=np.bool_)
    node: Layer | None = layer
    depth = 1
    while node is not None:
        own = node.own.get(leaf)
        if own is not None:
            entries = words(own)
            covered = open_ & _bits(entries | entries >> np.uint64(16))
            depths[covered] = depth
            open_ &= ~covered
        node = node.parent
        depth += 1
    return depths


_CONTEXTS = {"base:allocation": _allocation, "qemu:allocation-depth": _depth}


def status(layer: Layer, context: str, offset: int, length: int, subblock: int, most: int) -> Ranges:
    """What `context` says of a range: (length, flags), at most `most` of them, neighbours different.

    The answer may end early: after `most` extents, or after STATUS_LEAVES leaves with entries.
    """
    kind = _CONTEXTS[context]
    leaf_bytes = LEAF_SUBBLOCKS * subblock
    result: Ranges = []
    end = offset + length
    looked = 0
    while offset < end and looked < STATUS_LEAVES:
        leaf, within = divmod(offset, leaf_bytes)
        stop = min(end, (leaf + 1) * leaf_bytes)
        flags = kind(layer, leaf)
        if isinstance(flags, int):
            _extend(result, stop - offset, flags)
        else:
            looked += 1
            first, last = within // subblock, (stop - 1 - leaf * leaf_bytes) // subblock
            part = flags[first : last + 1]
            starts = np.flatnonzero(np.diff(part, prepend=part[:1] ^ np.uint32(0xFFFFFFFF)))
            positions = (leaf * leaf_bytes + (starts + first) * subblock).tolist()
            positions[0] = offset
            positions.append(stop)
            for index, value in enumerate(part[starts].tolist()):
                _extend(result, positions[index + 1] - positions[index], value)
                if len(result) > most:
                    return result[:most]
        offset = stop
    return result[:most]


def _extend(result: Ranges, length: int, flags: int) -> None:
    if result and result[-1][1] == flags:
        result[-1] = (result[-1][0] + length, flags)
    else:
        result.append((length, flags))


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
        state = np.where(_bits(changed), np.where(_bits(data_masks(after, leaf)), 2, 1), 0)
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

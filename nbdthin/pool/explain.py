"""The way of one read and one write, step by step: what `Volume.segments` and `Volume.reserve` decide, in words.

It changes nothing: no block is allocated; at most a leaf is composed, as a read does. Only `has_checksum` does I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nbdthin.errors import Invalid, OverQuota
from nbdthin.pool import sums
from nbdthin.pool.allocator import FULL as POOL_FULL
from nbdthin.pool.allocator import KEPT
from nbdthin.pool.layers import LEAF_MASK, LEAF_SHIFT, SUBBLOCKS, Layer, is_mixed
from nbdthin.pool.limits import advised
from nbdthin.pool.views import DATA, KINDS, NOTHING, UNWRITTEN, ZERO, Explanation, Look, WritePlan
from nbdthin.pool.volume import JOURNAL_LOW, Volume
from nbdthin.units import MiB, format_size

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool

LONGEST = 64 * MiB  # write that is explained: more than NBD clients send at once


def explain(pool: Pool, name: str, offset: int, length: int | None = None) -> Explanation:
    """The byte at `offset` of `name`, and a write of `length` there: by default of the subblock that it is in.

    `checksum` is left False: `has_checksum` says. Raises NotFound, or Invalid outside of the volume.
    """
    volume = pool.volume(name)
    layer, size = volume.layer, volume.size
    if not 0 <= offset < size:
        raise Invalid(f"{name!r} has {size} bytes, the last at {size - 1}: there is no byte {offset}")
    subblock_bytes = pool.block_size // SUBBLOCKS
    block, within = divmod(offset, pool.block_size)
    sub = within // subblock_bytes
    looks, owner = _way(layer, block, sub)
    state = looks[-1].says if owner is not None else UNWRITTEN
    physical = owner.entry(block) >> 32 if owner is not None and state == DATA else None
    start = offset
    if length is None:
        start -= offset % subblock_bytes
        length = min(subblock_bytes, size - start)
    most = min(LONGEST, size - start)
    if not 0 < length <= most:
        raise Invalid(f"a write there has 1 to {most} bytes, not {length}")
    return Explanation(
        name=name,
        kind=KINDS[volume.read_only],
        offset=offset,
        block=block,
        subblock=sub,
        state=state,
        layer=None if owner is None else owner.number,
        owner=None if owner is None else owner.name,
        depth=len(looks) - 1,
        chain=len(looks) + _below(owner),
        lookup=_lookup(layer, block, sub),
        layers=tuple(looks),
        physical=physical,
        position=None if physical is None else physical * pool.block_size + within,
        data_path=pool.data.path.absolute(),
        checksum=False,
        write=_write(volume, start, length),
    )


def _way(layer: Layer, block: int, sub: int) -> tuple[list[Look], Layer | None]:
    """What each layer says, down to the one that knows; None where none does."""
    looks = []
    node: Layer | None = layer
    while node is not None:
        entry = node.entry(block)
        says = DATA if entry >> sub & 1 else ZERO if entry >> 16 + sub & 1 else NOTHING
        looks.append(Look(node.number, node.name, says))
        if says != NOTHING:
            break
        node = node.parent
    return looks, node


def _below(layer: Layer | None) -> int:
    count = 0
    while layer is not None and layer.parent is not None:
        count, layer = count + 1, layer.parent
    return count


def _lookup(layer: Layer, block: int, sub: int) -> str:
    """Where a read finds the entry: see layers.py."""
    entry = layer.effective(block >> LEAF_SHIFT)[block & LEAF_MASK]
    if is_mixed(entry) and not entry >> sub & 1:
        return "walk"
    return "own leaf" if block >> LEAF_SHIFT in layer.own else "shared leaf"


def has_checksum(pool: Pool, seen: Explanation) -> bool:
    """The subblock that `seen` tells of has a checksum. Reads one record; may run in a thread."""
    layer = None if seen.layer is None else pool.state.layers.get(seen.layer)
    if seen.physical is None or layer is None or not pool.is_sealed(layer):
        return False
    records = pool.sums.read(np.array([seen.physical], dtype=np.uint64))
    (mask,) = sums.counting(pool, records, [seen.physical], [seen.block], pool.state.next_layer)
    return int(records["owner"][0]) == layer.number and bool(mask >> seen.subblock & 1)


def _write(volume: Volume, offset: int, length: int) -> WritePlan:
    """As Volume.reserve decides it."""
    layer, size = volume.layer, volume.pool.block_size
    sub_bytes = size // SUBBLOCKS
    end = offset + length
    start = offset if _owns(layer, offset, size) else offset - offset % sub_bytes
    stop = end if _owns(layer, end - 1, size) else -(-end // sub_bytes) * sub_bytes
    edges = [*volume.segments(start, offset - start), *volume.segments(end, stop - end)]
    overwritten = filled = allocated = blocks = 0
    for block in range(start // size, (stop - 1) // size + 1):
        first = max(start - block * size, 0) // sub_bytes
        last = min(stop - block * size - 1, size - 1) // sub_bytes
        entry, touched = layer.entry(block), (2 << last) - (1 << first)
        fresh = (touched & ~entry).bit_count()
        overwritten += (touched & entry).bit_count()
        if entry >> 32:
            filled += fresh
        else:
            allocated += fresh
            blocks += 1
    why = _refusal(volume, bool(filled or blocks), blocks)
    action = "refused" if why else "allocate" if blocks else "fill" if filled else "overwrite"
    read = sum(length for position, length in edges if position >= 0)
    return WritePlan(offset, length, action, overwritten, filled, allocated, blocks, read, why)


def _owns(layer: Layer, offset: int, size: int) -> bool:
    """The subblock at `offset` is the layer's own data."""
    block, within = divmod(offset, size)
    return bool(layer.entry(block) >> within // (size // SUBBLOCKS) & 1)


def _refusal(volume: Volume, changes: bool, blocks: int) -> str | None:
    """Why a write would be refused, or would have to wait; None: it would not.

    `changes`: it changes the mapping. `blocks`: how many it needs.
    """
    pool = volume.pool
    if volume.read_only:
        return "it is a snapshot, which never changes: clone it"
    if pool.failed is not None:
        return f"the pool is read-only: {pool.failed}"
    if changes and pool.journal_low:
        return JOURNAL_LOW
    if not blocks:
        return None
    try:
        quota, kept = pool.limits.left(volume.layer.number) or (blocks, 0)
    except OverQuota as error:
        return str(error)
    if quota < blocks:
        return f"its quota leaves {format_size(quota * pool.block_size)} (nbdthin quota {volume.name} SIZE)"
    may_grow = pool.policy.auto_extend and not pool.data.is_device
    if pool.allocator.free - kept < blocks and not may_grow:
        return advised(KEPT if kept else POOL_FULL, pool)
    return None

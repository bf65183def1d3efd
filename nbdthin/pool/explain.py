"""The way of one read and one write, step by step: what `Volume.segments` and `Volume.reserve` decide, in words.

It changes nothing: no block is allocated and no cache filled. Only `has_checksum` does I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nbdthin.errors import Invalid, OverQuota
from nbdthin.pool import sums
from nbdthin.pool.allocator import FULL as POOL_FULL
from nbdthin.pool.allocator import KEPT
from nbdthin.pool.layers import FULL, LEAF_MASK, LEAF_SHIFT, MIXED, SUBBLOCKS, Layer
from nbdthin.pool.limits import advised
from nbdthin.pool.views import DATA, NOTHING, UNWRITTEN, ZERO, Explanation, Look, WritePlan
from nbdthin.pool.volume import JOURNAL_LOW
from nbdthin.units import MiB, format_size

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool

LONGEST = 64 * MiB  # write that is explained: more than NBD clients send at once


def explain(pool: Pool, name: str, offset: int, length: int | None = None) -> Explanation:
    """The byte at `offset` of `name`, and a write of `length` there: by default of the subblock that it is in.

    `checksum` is left False: `has_checksum` says. Raises NotFound, or Invalid outside of the volume.
    """
    row = pool.show(name)
    if not 0 <= offset < row.size:
        raise Invalid(f"{name!r} has {row.size} bytes, the last at {row.size - 1}: there is no byte {offset}")
    layer = pool.state.layers[pool.state.names[name].layer]
    subblock_bytes = pool.block_size // SUBBLOCKS
    block, within = divmod(offset, pool.block_size)
    sub = within // subblock_bytes
    looks, owner = _way(layer, block, sub)
    state = looks[-1].says if owner is not None else UNWRITTEN
    physical = owner.entry(block) >> 32 if owner is not None and state == DATA else None
    if length is None:
        start = offset - offset % subblock_bytes
        write = _write(pool, name, start, min(subblock_bytes, row.size - start))
    else:
        if length <= 0 or length > LONGEST or offset + length > row.size:
            most = min(LONGEST, row.size - offset)
            raise Invalid(f"a write there has 1 to {most} bytes, not {length}")
        write = _write(pool, name, offset, length)
    return Explanation(
        name=name,
        kind=row.kind,
        offset=offset,
        block=block,
        subblock=sub,
        state=state,
        layer=None if owner is None else owner.number,
        owner=None if owner is None else owner.name,
        depth=len(looks) - 1,
        chain=len(looks) + _below(owner),
        lookup=_lookup(layer, block),
        layers=tuple(looks),
        physical=physical,
        position=None if physical is None else physical * pool.block_size + within,
        data_path=pool.data.path.absolute(),
        checksum=False,
        write=write,
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


def _lookup(layer: Layer, block: int) -> str:
    """Where a read finds the entry: see layers.py."""
    if layer.effective(block >> LEAF_SHIFT)[block & LEAF_MASK] >= MIXED:
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


def _write(pool: Pool, name: str, offset: int, length: int) -> WritePlan:
    """As Volume.reserve decides it."""
    volume = pool.volume(name)
    size, sub_bytes = pool.block_size, pool.block_size // SUBBLOCKS
    end = offset + length
    start = offset if _owns(volume.layer, offset, size) else offset - offset % sub_bytes
    stop = end if _owns(volume.layer, end - 1, size) else -(-end // sub_bytes) * sub_bytes
    edges = [*volume.segments(start, offset - start), *volume.segments(end, stop - end)]
    overwritten = filled = allocated = blocks = 0
    for block in range(start // size, (stop - 1) // size + 1):
        first = max(start - block * size, 0) // sub_bytes
        last = min(stop - block * size - 1, size - 1) // sub_bytes
        entry, touched = volume.layer.entry(block), (2 << last) - (1 << first)
        fresh = (touched & ~entry).bit_count()
        overwritten += (touched & entry).bit_count()
        if entry >> 32:
            filled += fresh
        else:
            allocated += fresh
            blocks += 1
    action = "allocate" if blocks else "fill" if filled else "overwrite"
    why = _refusal(pool, name, action, blocks)
    read = sum(length for position, length in edges if position >= 0)
    action = "refused" if why else action
    return WritePlan(offset, length, action, overwritten, filled, allocated, blocks, read, why)


def _owns(layer: Layer, offset: int, size: int) -> bool:
    """The subblock at `offset` is the layer's own data."""
    block, within = divmod(offset, size)
    return bool(layer.entry(block) & FULL) and bool(layer.entry(block) >> within // (size // SUBBLOCKS) & 1)


def _refusal(pool: Pool, name: str, action: str, blocks: int) -> str | None:
    """Why such a write would be refused, or would have to wait; None: it would not."""
    if pool.state.names[name].snapshot:
        return "it is a snapshot, which never changes: clone it"
    if pool.failed is not None:
        return f"the pool is read-only: {pool.failed}"
    if action != "overwrite" and pool.journal_low:
        return JOURNAL_LOW
    if not blocks:
        return None
    try:
        quota, kept = pool.limits.left(pool.state.names[name].layer) or (blocks, 0)
    except OverQuota as error:
        return str(error)
    if quota < blocks:
        return f"its quota leaves {format_size(quota * pool.block_size)} (nbdthin quota {name} SIZE)"
    may_grow = pool.policy.auto_extend and not pool.data.is_device
    if pool.allocator.free - kept < blocks and not may_grow:
        return advised(KEPT if kept else POOL_FULL, pool)
    return None

"""How much of the pool a volume or snapshot takes: in blocks, exact, from the entries.

A block is *referenced* by a layer that reads from it or owns it. It is *exclusive* to a name when no other name's
content needs it: what removing the name would give back once layers without a name have been merged.
Both are sums over leaves; what cannot have changed is remembered in `Layer.referenced`.
"""

from __future__ import annotations

import numpy as np

from nbdthin.pool.layers import FULL, LEAF_SHIFT, MIXED, ZERO_LEAF, Layer, Words, words

_TOTAL = -1  # the key in Layer.referenced of the sum over all leaves, kept for sealed layers


def referenced(layer: Layer) -> int:
    """Blocks that reads of `layer` touch, and blocks it owns without data."""
    chain = []
    node: Layer | None = layer
    total = 0
    while node is not None:
        known = node.referenced.get(_TOTAL)
        if known is not None:
            total = known
            break
        chain.append(node)
        node = node.parent
    for node in reversed(chain):
        total = node.blocks if node.parent is None else total + _difference(node)
        if not node.head:
            node.referenced[_TOTAL] = total
    return total


def _difference(layer: Layer) -> int:
    """Blocks that `layer` refers to beyond those of its parent; only its own leaves can differ."""
    assert layer.parent is not None
    total = 0
    for leaf in layer.own:
        known = layer.referenced.get(leaf)
        if known is None:
            known = layer.referenced[leaf] = _count(layer, leaf) - _count(layer.parent, leaf)
        total += known
    return total


def _count(layer: Layer, leaf: int) -> int:
    """Distinct blocks that one leaf of `layer` refers to."""
    effective = layer.effective(leaf)
    if effective is ZERO_LEAF:
        return 0
    entries = words(effective)
    mixed = entries >= MIXED
    holds = (entries & FULL != 0) & ~mixed
    own = layer.own.get(leaf)
    provisioned = np.zeros_like(holds) if own is None else (words(own) >> np.uint64(32) != 0) & ~holds & ~mixed
    total = int(np.count_nonzero(holds | provisioned))
    for index in np.flatnonzero(mixed).tolist():
        physical = set(layer.resolve((leaf << LEAF_SHIFT) + index))
        if own is not None:
            physical.add(own[index] >> 32)
        total += len(physical - {0})
    return total


def exclusive(layer: Layer) -> int:
    """Blocks that only the name of `layer` needs."""
    total = sum(_unneeded(layer, leaf) for leaf in layer.own) if layer.children else layer.blocks
    # A parent without a name and without another child will be merged into this layer.
    node = layer.parent
    while node is not None and node.name is None and len(node.children) == 1:
        total += node.blocks
        node = node.parent
    return total


def _unneeded(layer: Layer, leaf: int) -> int:
    """Blocks of a layer's leaf that none of its children lets through."""
    own = words(layer.own[leaf])
    live = _let_through(layer, leaf, (own & FULL).astype(np.uint64))
    return 0 if live is None else int(np.count_nonzero((own >> np.uint64(32) != 0) & (live == 0)))


def _let_through(layer: Layer, leaf: int, data: Words) -> Words | None:
    """The subblocks of `data` that some child of `layer` shows; None for all of them."""
    live = np.zeros_like(data)
    for child in layer.children.values():
        over = child.own.get(leaf)
        if over is None:
            return None
        entries = words(over)
        live |= data & ~(entries | entries >> np.uint64(16))
    return live


def named_parent(layer: Layer) -> str | None:
    """The nearest snapshot below `layer`."""
    node = layer.parent
    while node is not None and node.name is None:
        node = node.parent
    return None if node is None else node.name

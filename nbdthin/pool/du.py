"""What names take, and what removing some of them at once would give back.

The second is more than the sum of what each has to itself: two clones may be the last to need a block. So the removal
is gone through on a draft, with the rules of merge.py: first what becomes of the layers, at once (`_Draft`), then, in
steps of bounded length between which others run, what that does to their entries (`_Leaves`). Nothing is changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nbdthin.errors import NotFound
from nbdthin.pool import merge, space
from nbdthin.pool.layers import FULL, MIXED, State, Words
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.pool.views import DiskUse

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool

LEAVES = 16  # gone over at once: 0.3 ms for a merge
_SIXTEEN, _THIRTY_TWO = np.uint64(16), np.uint64(32)

Own = dict[int, "array[int]"]


def disk_use(pool: Pool, names: Sequence[str]) -> Generator[None, None, DiskUse]:
    """The rows of `names`, or of all, and what removing them together frees, step by step. Raises NotFound."""
    wanted = sorted(set(names) or pool.state.names)
    for name in wanted:
        if name not in pool.state.names:
            raise NotFound(f"no volume or snapshot {name!r} (`nbdthin ls` lists what there is)")
    return _disk_use(pool, wanted, every=len(wanted) == len(pool.state.names))


def _disk_use(pool: Pool, names: list[str], every: bool) -> Generator[None, None, DiskUse]:
    used = pool.allocator.used
    # Both now: later the layers may be others.
    removal, pending = None if every else _Draft(pool.state, names), _Draft(pool.state, ())
    rows = []
    for name in names:
        if name in pool.state.names:
            yield from space.prepare([pool.state.layers[pool.state.names[name].layer]])
        if name in pool.state.names:
            rows.append(pool.show(name))
        yield
    freed = used
    if removal is not None:
        freed = yield from removal.freed()
    already = yield from pending.freed()  # comes back whatever is removed
    return DiskUse(tuple(rows), (freed - already) * pool.block_size, used * pool.block_size)


class _Node:
    """A layer of the draft."""

    __slots__ = ("children", "named", "parent")

    def __init__(self, parent: int, children: dict[int, None], named: bool) -> None:
        self.parent = parent  # 0: none
        self.children = children
        self.named = named


class _Draft:
    """What `names` less make of the layers: as State.apply, and then Pool.merge_all, would have it."""

    def __init__(self, state: State, names: Sequence[str]) -> None:
        self._state = state
        self._nodes: dict[int, _Node] = {}
        self._mergeable = dict(state.mergeable)
        self._prunable = dict(state.prunable)
        self._gone = 0  # blocks of layers that nobody needs
        self._own: dict[int, Own] = {}  # of the layers that matter, as they are now
        self._acts: list[_Merge | _Prune] = []
        for name in names:
            number = state.names[name].layer
            self._node(number).named = False
            self._collapse(number)
        self._merge_all()

    def _node(self, number: int) -> _Node:
        node = self._nodes.get(number)
        if node is None:
            layer = self._state.layers[number]
            parent = 0 if layer.parent is None else layer.parent.number
            node = self._nodes[number] = _Node(parent, dict.fromkeys(layer.children), layer.name is not None)
        return node

    def _collapse(self, number: int) -> None:
        """As State._collapse."""
        node = self._node(number)
        while number and not node.named and not node.children:
            self._mergeable.pop(number, None)
            self._prunable.pop(number, None)
            self._gone += self._state.layers[number].blocks
            child, number = number, node.parent
            if number:
                node = self._node(number)
                del node.children[child]
        if number and not node.named:
            self._unnamed(number)

    def _unnamed(self, number: int) -> None:
        """As State._unnamed."""
        if len(self._node(number).children) == 1:
            self._prunable.pop(number, None)
            self._mergeable[number] = None
        else:
            self._prunable[number] = None

    def _merge_all(self) -> None:
        while self._prunable or self._mergeable:
            number = next(iter(self._prunable or self._mergeable))
            children = tuple(self._node(number).children)
            if number in self._prunable:
                del self._prunable[number]
                self._acts.append(_Prune(number, children))
            else:
                del self._mergeable[number]
                self._acts.append(_Merge(number, children[0]))
                self._unlink(number, children[0])
            for each in (number, *children):
                if each not in self._own:
                    self._own[each] = self._state.layers[each].own.copy()

    def _unlink(self, number: int, child: int) -> None:
        """As merge.unlink: `child` takes the place of its parent, which held nothing any more when it went."""
        parent = self._node(number).parent
        below = self._node(child)
        below.parent = parent
        if parent:
            above = self._node(parent)
            above.children[child] = None
            del above.children[number]
            if not above.named:
                self._unnamed(parent)
        if not below.named and len(below.children) > 1:
            self._prunable[child] = None

    def freed(self) -> Generator[None, None, int]:
        """Blocks."""
        total = self._gone
        emptied = {act.layer for act in self._acts}
        leaves = sorted({leaf for number in emptied for leaf in self._own[number]})
        for start in range(0, len(leaves), LEAVES):
            part = _Leaves(self._own, leaves[start : start + LEAVES])
            for act in self._acts:
                total += act.apply(part)
                yield
        return total


class _Leaves:
    """Some leaves of all layers of a draft, loaded when they are first asked for."""

    def __init__(self, own: dict[int, Own], leaves: list[int]) -> None:
        self._own = own
        self._leaves = leaves
        self._present: dict[int, npt.NDArray[np.bool_]] = {}
        self._entries: dict[int, Words] = {}

    def present(self, layer: int) -> npt.NDArray[np.bool_]:
        """Which of the leaves the layer has."""
        found = self._present.get(layer)
        if found is None:
            own = self._own[layer]
            found = self._present[layer] = np.array([leaf in own for leaf in self._leaves], dtype=np.bool_)
        return found

    def entries(self, layer: int) -> Words:
        """Its entries, a row a leaf, zeroes where it has none; to be changed by the caller."""
        found = self._entries.get(layer)
        if found is None:
            found = self._entries[layer] = np.zeros((len(self._leaves), LEAF_BLOCKS), dtype=np.uint64)
            own = self._own[layer]
            for row, leaf in enumerate(self._leaves):
                if leaf in own:
                    found[row] = np.frombuffer(own[leaf], dtype=np.uint64)
        return found


class _Prune:
    """merge.prune of a layer without a name and with several children."""

    def __init__(self, layer: int, children: tuple[int, ...]) -> None:
        self.layer = layer
        self._children = children

    def apply(self, leaves: _Leaves) -> int:
        """Blocks that it frees."""
        rows = leaves.present(self.layer).copy()
        for child in self._children:
            if not rows.any():
                return 0
            rows &= leaves.present(child)  # a child without the leaf shows all of it
        own = leaves.entries(self.layer)[rows]
        data = own & FULL
        shown = np.zeros_like(own)
        for child in self._children:
            over = leaves.entries(child)[rows]
            shown |= data & ~(over | over >> _SIXTEEN)
        unneeded = (own >> _THIRTY_TWO != 0) & (shown == 0)
        leaves.entries(self.layer)[rows] = merge.pruned(own, unneeded)
        return int(np.count_nonzero(unneeded))


class _Merge:
    """A merge.Step for each leaf of a layer."""

    def __init__(self, layer: int, child: int) -> None:
        self.layer = layer
        self._child = child

    def apply(self, leaves: _Leaves) -> int:
        """Blocks that it frees."""
        rows = leaves.present(self.layer)
        if not rows.any():
            return 0
        lower, upper = leaves.entries(self.layer)[rows], leaves.entries(self._child)[rows]
        joined, goes, done = merge.join(upper, lower)
        both = ~done  # parts of both show, which takes a copy: one of two blocks stays
        shown = (upper | lower & ~(upper >> _SIXTEEN)) & FULL
        zero = (upper | lower) >> _SIXTEEN & FULL & ~shown
        joined[both] = (upper & MIXED | zero << _SIXTEEN | shown)[both]
        leaves.entries(self._child)[rows] = joined
        leaves.present(self._child)[rows] = True
        return int(np.count_nonzero(goes)) + int(np.count_nonzero(both))

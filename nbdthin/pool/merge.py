"""Merging a layer that lost its name into its only child, so that its overwritten blocks come free.

A layer without a name and with several children stays, pruned of the blocks that none of them shows.

Nothing waits for it and nothing changes to the eye: every volume and snapshot reads as before, at every moment and
after any crash. It goes some leaves at a time; in each, entries that the child does not cover move to it. Where both
layers hold parts of one block, the parent's missing subblocks are copied into the child's block, to places that are not
valid there yet, or the child's into the parent's where that is less and those places are not valid there: a crash in
between leaves bytes that nobody reads.

Sums move along (sums.py), into a sealed child, before the entries do, and what is copied is compared with them. What
does not compare is copied as it is, with the sum that it should have, so that a scrub finds it where it is then.

A step is `copy`, which does I/O and may run in a thread, between its making and `finish`. Whoever lets others run
meanwhile keeps writers off `blocks` of `layer` when that is a volume's head (live.py does).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nbdthin.pool import events, sums
from nbdthin.pool.layers import FULL, LEAF_SHIFT, MIXED, SUBBLOCKS, Layer, Words, words
from nbdthin.pool.records import Layer as LayerRecord
from nbdthin.pool.space import shown_by

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool

COPIES = 16  # blocks joined by copying in one step, of 5 us each in the event loop; the rest is for the next
LEAVES = 8  # of one step, at most, where merging is behind: what a step costs beside them is that of several
BEHIND = 8  # layers waiting to be merged from which on sums are not carried over
_SIXTEEN, _THIRTY_TWO = np.uint64(16), np.uint64(32)


class Step:
    """The merge of some leaves of `parent` into `layer`."""

    def __init__(self, pool: Pool, parent: Layer, layer: Layer, leaves: Sequence[int]) -> None:
        """`leaves` are some that `parent` has; only so many of them are taken as make a step of bounded length."""
        self._pool = pool
        self._parent = parent
        self.layer = layer
        self.leaves: list[int] = []
        self._copies: list[tuple[int, int, int]] = []  # from position, to position, length
        # By leaf: index -> (entry to be, physical block that it makes free)
        self._joined: dict[int, dict[int, tuple[int, int]]] = {}
        self._sources: dict[int, tuple[int, int, int]] = {}  # of copies: physical block -> volume's block, owner, mask
        self._damaged: list[tuple[int, int, int]] = []  # copied although its sum says otherwise: block, owner, subblock
        # Sums move with what they are of, where there are any; a head has none. Where merging is behind they are
        # computed anew: it would fall behind further.
        behind = len(pool.state.mergeable) > BEHIND
        summed = not behind and not pool.sums.touched.isdisjoint((parent.number, layer.number))
        self._seals = summed and pool.is_sealed(layer) and parent.number not in pool.sums.distrusted
        if self._seals:
            pool.sums.begin_move(parent.number)
        room = COPIES
        for leaf in leaves:
            if room:
                self.leaves.append(leaf)
                room -= self._plan_leaf(leaf, room)

    @property
    def blocks(self) -> list[int]:
        """Blocks of `layer` that are copied: no one may write them between now and `finish`."""
        return [block for block, _, _ in self._sources.values()]

    def _plan_leaf(self, leaf: int, most: int) -> int:
        """Returns how many blocks are to be copied, of which there may be more than `most`."""
        over, under = self.layer.own.get(leaf), self._parent.own[leaf]
        if over is None:
            return 0
        upper, lower = words(over), words(under)
        rest = FULL & ~(upper | upper >> _SIXTEEN)
        both = np.flatnonzero((upper & FULL != 0) & (lower & rest & FULL != 0))[:most].tolist()
        for index in both:
            self._plan(leaf, index, over[index], under[index])
        return len(both)

    def _plan(self, leaf: int, index: int, upper: int, lower: int) -> None:
        """Both hold data of one block: decide which block stays."""
        needed = lower & FULL & ~(upper | upper >> 16)
        data = upper & FULL
        zero = (upper | lower) >> 16 & FULL & ~(data | needed)
        into_child = data & lower & FULL != 0 or needed.bit_count() <= data.bit_count()
        source, target, moved = (lower, upper, needed) if into_child else (upper, lower, data)
        subblock = self._pool.block_size // SUBBLOCKS
        sub = 0
        while sub < SUBBLOCKS:
            count = 0
            while sub + count < SUBBLOCKS and moved >> (sub + count) & 1:
                count += 1
            if count:
                origin = (source >> 32) * self._pool.block_size + sub * subblock
                goal = (target >> 32) * self._pool.block_size + sub * subblock
                self._copies.append((origin, goal, count * subblock))
            sub += max(count, 1)
        entry = target >> 32 << 32 | zero << 16 | data | needed
        self._joined.setdefault(leaf, {})[index] = entry, source >> 32
        owner = self._parent.number if into_child else self.layer.number
        self._sources[source >> 32] = (leaf << LEAF_SHIFT) + index, owner, moved

    @property
    def has_io(self) -> bool:
        """`copy` has something to do: it is to be called, and may take its time."""
        return bool(self._joined) or self._seals

    def copy(self) -> None:
        """Copy what has to move. Raises OSError; the step is then given up, and nothing has changed."""
        records = self._records()
        for origin, goal, length in self._copies:
            buffer = memoryview(bytearray(length))
            self._pool.data.read_into(buffer, origin)
            self._pool.data.write(buffer, goal)
            block, first = divmod(origin, self._pool.block_size)
            if block in records:
                self._compare(buffer, block, first, records[block])
        if self._seals:
            for leaf in self.leaves:
                self._move_sums(leaf)

    def _records(self) -> dict[int, np.void]:
        """The sums of what is to be copied, where there are any."""
        if not self._sources or not self._pool.sums.exists:
            return {}
        blocks = np.array(sorted(self._sources), dtype=np.uint64)
        records = self._pool.sums.read(blocks)
        pairs = zip(blocks.tolist(), records, strict=True)
        return {block: record for block, record in pairs if record["owner"] == self._sources[block][1]}

    def _compare(self, view: memoryview, block: int, first: int, record: np.void) -> None:
        """What was copied, from byte `first` of a block, with its sum. Only noted: as it is it has to go on, there is
        no other."""
        number, owner, _ = self._sources[block]
        mask, sub = int(record["mask"]), self._pool.block_size // SUBBLOCKS
        for each in range(len(view) // sub):
            place = first // sub + each
            if mask >> place & 1 and sums.checksum(view[each * sub : (each + 1) * sub]) != record["sums"][place]:
                self._damaged.append((number, owner, place))

    def _move_sums(self, leaf: int) -> None:
        """Before the entries: a record whose owner has no such entry yet only waits."""
        pool, before, after = self._pool, self._parent.number, self.layer.number
        lower = words(self._parent.own[leaf])
        over = self.layer.own.get(leaf)
        if over is None:
            moved, kept = lower >> _THIRTY_TWO, lower & FULL
        else:
            joined, _, done = join(words(over), lower)
            moved = np.where(done & (joined & MIXED == lower & MIXED), lower >> _THIRTY_TWO, np.uint64(0))
            kept = joined & FULL
        pool.sums.reown(before, after, moved[moved != 0], kept[moved != 0])
        for target, block in self._joined.get(leaf, {}).values():
            _, owner, mask = self._sources[block]
            other = after if owner == before else before
            pool.sums.join((block, owner, mask), (target >> 32, other, target & FULL & ~mask), after)

    def _tell(self) -> None:
        size = self._pool.block_size
        for block, owner, each in self._damaged:
            names = sums.showing(self._pool.state.layers[owner], block, each)
            offset = block * size + each * (size // SUBBLOCKS)
            what = f"damaged data at byte {offset} of {', '.join(names) or 'no volume'}: copied as it is"
            self._pool.notify(
                events.DAMAGE,
                what,
                name=names[0] if names else "",
                offset=offset,
                length=size // SUBBLOCKS,
                affected=names,
            )

    def finish(self) -> bool:
        """Move the entries. False when the child has data in blocks that another step must copy."""
        self._tell()
        if self._seals:
            self._pool.sums.end_move(self.layer.number)
        elif not self.layer.head:
            self._pool.sums.todo[self.layer.number] = None
        return all([self._finish_leaf(leaf) for leaf in self.leaves])

    def _finish_leaf(self, leaf: int) -> bool:
        pool, parent, layer = self._pool, self._parent, self.layer
        lower = parent.own[leaf]
        over = layer.own.get(leaf)
        left = False
        if over is None:
            moved, remains = lower[:], None  # a copy: a checkpoint may be holding the sealed parent's
        else:
            joined, gone, done = join(words(over), words(lower))
            for index, (entry, physical) in self._joined.get(leaf, {}).items():
                joined[index], gone[index], done[index] = entry, physical, True
            pool.discard_blocks(gone[gone != 0])
            left = not done.all()
            moved = array("Q", joined.tobytes())
            remains = array("Q", np.where(done, np.uint64(0), words(lower)).tobytes()) if left else None
        pool.put_leaf(parent, leaf, remains)
        pool.put_leaf(layer, leaf, moved)
        if leaf in self._joined:  # else all that shows is where it was, and there may be very many above
            _forget_below(layer, leaf)
        parent.referenced.clear()
        return not left


def join(upper: Words, lower: Words) -> tuple[Words, Words, npt.NDArray[np.bool_]]:
    """For each block of a leaf: the entry that stands for both, the block that it makes free or 0, and whether it does.

    It does not where both hold data that shows: that takes a copy. All at once, not one by one: the event loop waits.
    """
    covered = (upper | upper >> _SIXTEEN) & FULL
    needed = lower & FULL & ~covered
    zero = (upper >> _SIXTEEN | lower >> _SIXTEEN & ~covered) & FULL
    data = upper & FULL
    of_upper, of_lower = upper & MIXED, lower & MIXED
    done = (data == 0) | (needed == 0)
    # The lower block stays where something of it shows, and where nothing covers it: provisioned, as the upper may be.
    keeps_lower = (of_lower != 0) & ((needed != 0) | (of_upper == 0) & (covered == 0))
    stays = np.where(keeps_lower, of_lower, of_upper)
    joined = np.where(done, stays | zero << _SIXTEEN | np.where(keeps_lower, needed, data), upper)
    goes = np.where(keeps_lower, of_upper, of_lower) >> _THIRTY_TWO
    return joined, np.where(done, goes, np.uint64(0)), done


def _forget_below(layer: Layer, leaf: int) -> None:
    """Effective leaves that may point to what has moved are built anew."""
    todo = [layer]
    while todo:
        node = todo.pop()
        node.forget(leaf)
        node.referenced.clear()
        todo.extend(node.children.values())


def prune(pool: Pool, layer: Layer) -> Iterator[None]:
    """Free the blocks of a layer without a name that none of its children shows; leaf by leaf, no I/O.

    For a layer with several children, which cannot be merged. Ends early when it loses one.
    """
    # Out first: who takes a child away meanwhile puts it in again, and it all begins anew.
    pool.state.prunable.pop(layer.number, None)
    children = list(layer.children)
    for leaf in list(layer.own):
        if list(layer.children) != children:
            return
        own = words(layer.own[leaf])
        shown = shown_by(layer.children.values(), leaf, (own & FULL).astype(np.uint64))
        if shown is None:
            continue
        unneeded = (own >> np.uint64(32) != 0) & (shown == 0)
        if unneeded.any():
            pool.discard_blocks(own[unneeded] >> np.uint64(32))
            pool.put_leaf(layer, leaf, array("Q", pruned(own, unneeded).tobytes()))
            _forget_below(layer, leaf)
        yield


def pruned(own: Words, unneeded: npt.NDArray[np.bool_]) -> Words:
    """The entries of a leaf without the blocks that are not needed.

    They go on to hide what the layers below have there, as zeroes: else that would seem to be needed.
    """
    return np.where(unneeded, (own | own << _SIXTEEN) & (FULL << 16), own)


def child_of(pool: Pool, parent: Layer) -> Layer | None:
    """The layer that `parent` can be merged into, if that is still so."""
    if parent.number not in pool.state.mergeable or not pool.is_settled(parent):
        return None
    (child,) = parent.children.values()
    return child


def next_leaves(parent: Layer, most: int = LEAVES) -> list[int]:
    """Leaves that the next step may take."""
    return list(islice(parent.own, most))


def unlink(pool: Pool, parent: Layer, child: Layer) -> None:
    """Every leaf has been merged: `child` takes its parent's place."""
    assert not parent.own
    pool.apply([LayerRecord(child.number, parent.parent.number if parent.parent is not None else 0)])
    if child.name is None and len(child.children) > 1:  # its children may show nothing of what it has got
        pool.state.prunable[child.number] = None


def steps(pool: Pool, parent: Layer, leaves: int = LEAVES) -> Iterator[Step]:
    """The steps, of up to `leaves` each, that merge `parent`, a layer without a name, into its only child.

    At last it is gone. Each must be finished, or given up, before the next is asked for. Ends early when the child goes
    away meanwhile.
    """
    while (child := child_of(pool, parent)) is not None:
        if not parent.own:
            unlink(pool, parent, child)
            return
        yield Step(pool, parent, child, next_leaves(parent, leaves))

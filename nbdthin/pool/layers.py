"""Layers, their leaves, and the one function that changes what exists.

An entry is 64 bits: physical block << 32 | zero mask << 16 | data mask, one mask bit a subblock (a sixteenth of a
block). A set data bit: this layer's own data, in the physical block. A set zero bit: reads as zero here, whatever the
parents hold. Neither: the parent's subblock, or zero where there is no parent. A physical block without data bits is
provisioned: owned, nothing in it valid yet.

A layer's *own* leaves are what it wrote. Its *effective* leaves answer reads without walking: the own leaf composed
over the parent's effective leaf, built when first touched. Where the own leaf is absent the effective leaf *is* the
parent's, the same object, so a thousand clones share their image's. Rules that make this sound:

- leaves of a layer that is not a volume's head never change, but for `merge.py`, which puts new ones in their place;
- a head's effective leaf is private to it from the moment that it has an own leaf there (`Layer.put`);
- a layer that owns nothing shows what its parent shows, and has its caches, the same objects (`_share`): a clone that
  is only read takes no memory for it, however large it is. They part when it gets its first own leaf (`_part`);
- an own leaf that a checkpoint holds (`captured`) is not changed but replaced, by `put` with a copy;
- an effective entry whose subblocks lie in several physical blocks is mixed: it has the block that most of what shows
  is in, as far as composing knows, and those subblocks, each said to be data and zero at once. The others, and all of
  MIXED, of which no block is known, are resolved by walking (`resolve`).

`State.apply` is the only place where names and layers come and go, live and at recovery.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdthin.pool import records
from nbdthin.pool.records import LEAF_BLOCKS, BadRecord, Record

SUBBLOCKS: Final = 16
FULL: Final = 0xFFFF
MIXED: Final = 0xFFFFFFFF << 32  # no physical block has this number (Pool.init sees to it); also the mask of the number
LEAF_SHIFT: Final = 9
LEAF_MASK: Final = LEAF_BLOCKS - 1
ZERO_LEAF: Final = array("Q", bytes(8 * LEAF_BLOCKS))  # shared; never written
PART_LEAVES = 256  # gone over at once: 1 MiB of entries
_WORTH_NUMPY = 16  # entries of one leaf from which on numpy is faster than a loop: 4 us for a leaf, 0.2 us for an entry
MIXED_CACHE: Final = 1 << 14  # resolved blocks a layer remembers (about 300 bytes each)

Words = npt.NDArray[np.uint64]


def words(leaf: array[int]) -> Words:
    """The leaf's memory as numpy sees it."""
    return np.frombuffer(leaf, dtype=np.uint64)


def is_mixed(entry: int) -> bool:
    """Of an effective entry: subblocks that it does not say to be data may be, in other physical blocks."""
    return bool(entry >> 16 & entry & FULL) or entry >= MIXED


def are_mixed(entries: Words) -> npt.NDArray[np.bool_]:
    """`is_mixed` of each."""
    result: npt.NDArray[np.bool_] = (entries >> np.uint64(16) & entries & FULL != 0) | (entries >= MIXED)
    return result


def compose(own: int, below: int) -> int:
    """The effective entry of `own` over the parent's effective entry `below`."""
    data = own & FULL
    rest = FULL & ~(data | own >> 16)
    inherited = below & rest
    if inherited == rest or not is_mixed(below):
        if not inherited:
            return own
        if not data:
            return below & MIXED | inherited
    if inherited.bit_count() > data.bit_count():
        return below & MIXED | inherited << 16 | inherited
    return own & MIXED | data << 16 | data if data else MIXED


def near(own: array[int], block: int, region: int) -> int:
    """Where a physical block for `block` belongs, by `own`, the leaf that has it: as far from that of another one of
    its region as the two are from each other. A region is `region` blocks from a multiple of that on. 0: there is none.
    """
    index = block & LEAF_MASK
    first = index - index % region
    entries = own[first : first + region]
    last = max(entries)
    return (last >> 32) + index - first - entries.index(last) if last >> 32 else 0


def compose_leaves(own: array[int], below: array[int]) -> array[int]:
    """`compose` for all entries of a leaf; a new array."""
    upper, lower = words(own), words(below)
    data = upper & FULL
    rest = FULL & ~(data | upper >> np.uint64(16))
    inherited = lower & rest
    most = np.where(
        np.bitwise_count(inherited) > np.bitwise_count(data), lower & MIXED | inherited, upper & MIXED | data
    )
    mixed = np.where(most & FULL, most | (most & FULL) << np.uint64(16), np.uint64(MIXED))
    one = np.where(inherited == 0, upper, lower & MIXED | inherited)
    in_one = ((inherited == rest) | ~are_mixed(lower)) & ((inherited == 0) | (data == 0))
    return array("Q", np.where(in_one, one, mixed).tobytes())


def covers_all(leaf: array[int]) -> bool:
    """No subblock of the leaf is inherited."""
    entries = words(leaf)
    return bool(((entries | entries >> np.uint64(16)) & FULL == FULL).all())


class Layer:
    """A set of blocks with one owner. See the module's rules for who may change what."""

    __slots__ = (
        "blocks",
        "captured",
        "changes",
        "children",
        "dirty",
        "dirty_leaves",
        "effective_leaves",
        "head",
        "in_flight",
        "mixed",
        "name",
        "number",
        "own",
        "parent",
        "referenced",
    )

    def __init__(self, number: int, parent: Layer | None) -> None:
        self.number = number
        self.parent = parent
        self.children: dict[int, Layer] = {}
        self.name: str | None = None  # the volume or snapshot whose content this is
        self.head = False  # a volume's, and so writable
        self.own: dict[int, array[int]] = {}
        self.captured: dict[int, array[int]] | None = None  # own leaves that a checkpoint is being written from
        self.effective_leaves: dict[int, array[int]] = {}  # a cache; perhaps another layer's, too
        self.mixed: dict[int, tuple[int, ...]] = {}  # the same: block -> physical block of each subblock
        self.referenced: dict[int, tuple[int, int]] = {}  # a cache of space.py: leaf -> blocks visible, provisioned
        self.blocks = 0  # physical blocks owned
        self.in_flight = 0  # physical blocks allocated for writes on their way, in no entry yet
        self.changes = 0  # counts changes of own leaves, for caches elsewhere
        self.dirty: set[int] | None = None  # blocks changed since the last commit was packed
        self.dirty_leaves: set[int] | None = None  # the same for leaves changed as a whole

    def effective(self, leaf: int) -> array[int]:
        """The effective leaf; not to be changed by the caller."""
        found = self.effective_leaves.get(leaf)
        return self._build(leaf) if found is None else found

    def _build(self, leaf: int) -> array[int]:
        chain = []
        base = self._share()
        node: Layer | None = base
        below = ZERO_LEAF
        while node is not None:
            found = node.effective_leaves.get(leaf)
            if found is not None:
                below = found
                break
            chain.append(node)
            node = node.parent
        for node in reversed(chain):
            own = node.own.get(leaf)
            if own is not None:
                whole = node.parent is None or (not node.head and covers_all(own))
                below = own if whole else compose_leaves(own, below)
            # Kept where siblings will ask again; a long chain does not keep a leaf for each of its layers.
            if node is base or node is base.parent or len(node.children) > 1:
                node.effective_leaves[leaf] = below
        return below

    def _share(self) -> Layer:
        """The layer whose caches this one has: the nearest one, from itself down, that owns something."""
        base = self
        while not base.own and base.parent is not None:
            base = base.parent
        self.effective_leaves, self.mixed = base.effective_leaves, base.mixed
        return base

    def _part(self) -> None:
        """What this layer shows is about to differ from what its parent does: fresh caches, also for those above."""
        todo = [self]
        while todo:
            node = todo.pop()
            node.effective_leaves, node.mixed = {}, {}
            todo.extend(child for child in node.children.values() if not child.own)

    def resolve(self, block: int) -> tuple[int, ...]:
        """The physical block of each subblock of a mixed block, 0 for one that reads as zero."""
        found = self.mixed.get(block)
        if found is not None:
            return found
        self._share()
        found = self.mixed.get(block)
        if found is not None:
            return found
        result = [0] * SUBBLOCKS
        rest = FULL
        leaf, index = block >> LEAF_SHIFT, block & LEAF_MASK
        node: Layer | None = self
        while node is not None and rest:
            own = node.own.get(leaf)
            if own is not None:
                entry = own[index]
                data = entry & rest
                physical = entry >> 32  # one integer for all of it: there are many of these
                if data:
                    for sub in range(SUBBLOCKS):
                        if data >> sub & 1:
                            result[sub] = physical
                rest &= ~(entry | entry >> 16)
            node = node.parent
        if len(self.mixed) >= MIXED_CACHE:
            self.mixed.clear()
        resolved = self.mixed[block] = tuple(result)
        return resolved

    def data_mask(self, block: int) -> int:
        """The subblocks of `block` that hold data (the rest read as zero)."""
        entry = self.effective(block >> LEAF_SHIFT)[block & LEAF_MASK]
        if not is_mixed(entry):
            return entry & FULL
        return sum(1 << sub for sub, physical in enumerate(self.resolve(block)) if physical)

    def entry(self, block: int) -> int:
        """The own entry of `block`; 0 inherits all of it."""
        own = self.own.get(block >> LEAF_SHIFT)
        return 0 if own is None else own[block & LEAF_MASK]

    def put(self, block: int, entry: int) -> None:
        """Set an own entry of a head. What becomes of the old one's physical block is the caller's to say."""
        leaf, index = block >> LEAF_SHIFT, block & LEAF_MASK
        parent = self.parent
        own = self.own.get(leaf)
        if own is None:
            if parent is not None:
                private = self.effective(leaf)[:]
                if not self.own:
                    self._part()
                self.effective_leaves[leaf] = private
            own = self.own[leaf] = ZERO_LEAF[:]
            if parent is None:
                self.effective_leaves[leaf] = own
        elif self.captured is not None and self.captured.get(leaf) is own:
            own = self._leave_to_capture(leaf, own)
        old = own[index]
        own[index] = entry
        if parent is not None:
            effective = self.effective_leaves.get(leaf)
            if effective is not None:
                effective[index] = compose(entry, parent.effective(leaf)[index])
            if self.mixed:
                self.mixed.pop(block, None)
        if (old ^ entry) >> 32:
            self.blocks += bool(entry >> 32) - bool(old >> 32)
        self.changes += 1
        if self.referenced:
            self.referenced.pop(leaf, None)
        if self.dirty is None:
            self.dirty = set()
        self.dirty.add(block)

    def _leave_to_capture(self, leaf: int, own: array[int]) -> array[int]:
        """A copy in the place of an own leaf that must not change any more."""
        copy = self.own[leaf] = own[:]
        if self.effective_leaves.get(leaf) is own:
            self.effective_leaves[leaf] = copy
        return copy

    def put_leaf(self, leaf: int, entries: array[int] | None) -> None:
        """Set a whole own leaf (None: nothing of its own there). Caches of this layer, not of its children, follow."""
        if entries is not None and not self.own:
            self._part()
        old = self.own.pop(leaf, None)
        if old is not None:
            self.blocks -= int(np.count_nonzero(words(old) >> np.uint64(32)))
        if entries is not None:
            self.own[leaf] = entries
            self.blocks += int(np.count_nonzero(words(entries) >> np.uint64(32)))
        self.forget(leaf)
        self.changes += 1
        if self.dirty_leaves is None:
            self.dirty_leaves = set()
        self.dirty_leaves.add(leaf)

    def drop_leaves(self, leaves: Sequence[int]) -> Words:
        """`put_leaf` of nothing for own leaves, at least one. Returns the physical blocks that they held."""
        physical: Words = np.frombuffer(b"".join(map(self.own.pop, leaves)), dtype=np.uint64) >> np.uint64(32)
        if not physical.all():
            physical = physical[physical != 0]
        self.blocks -= len(physical)
        for leaf in leaves:
            self.forget(leaf)
        self.changes += 1
        if self.dirty_leaves is None:
            self.dirty_leaves = set()
        self.dirty_leaves.update(leaves)
        return physical

    def forget(self, leaf: int) -> None:
        """Drop what the caches hold of a leaf."""
        self.effective_leaves.pop(leaf, None)
        self.referenced.pop(leaf, None)
        if self.mixed:
            self.mixed.clear()

    def physical_blocks(self) -> Words:
        """Every physical block that the layer owns."""
        parts = list(self.physical_parts())
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)

    def physical_parts(self) -> Iterator[Words]:
        """The same in parts of some leaves, for who can do without an array of them all."""
        leaves = iter(self.own.values())
        while some := list(islice(leaves, PART_LEAVES)):
            physical: Words = np.concatenate([words(leaf) for leaf in some]) >> np.uint64(32)
            yield physical[physical != 0]

    def take_dirty(self) -> list[Record]:
        """The records of what changed since the last call, with the values of this moment."""
        result: list[Record] = []
        leaves, self.dirty_leaves = self.dirty_leaves or set(), None
        for leaf in sorted(leaves):
            own = self.own.get(leaf)
            result.append(records.Leaf(self.number, leaf, b"" if own is None else own.tobytes()))
        dirty, self.dirty = self.dirty or set(), None
        blocks = sorted(block for block in dirty if block >> LEAF_SHIFT not in leaves)
        if blocks:
            entries = records.u64(map(self.entry, blocks))
            result.append(records.Entries(self.number, records.u64(blocks), entries))
        return result

    def load_entries(self, record: records.Entries) -> None:
        """Recovery: set many own entries. Their order is the journal's; later ones win."""
        if len(record.blocks) != len(record.entries) or len(record.blocks) % 8:
            raise BadRecord(f"{len(record.blocks)} bytes of blocks with {len(record.entries)} bytes of entries")
        blocks = np.frombuffer(record.blocks, dtype=np.uint64)
        entries = np.frombuffer(record.entries, dtype=np.uint64)
        if len(blocks) < _WORTH_NUMPY:
            self._load_each(blocks, entries)
            return
        leaves = blocks >> np.uint64(LEAF_SHIFT)
        starts = np.flatnonzero(np.diff(leaves, prepend=leaves[:1] + np.uint64(1)))
        if len(starts) * _WORTH_NUMPY > len(blocks):
            self._load_each(blocks, entries)
            return
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(blocks)], strict=True):
            own = self._own_leaf(int(leaves[start]))
            words(own)[blocks[start:end] & np.uint64(LEAF_MASK)] = entries[start:end]

    def _load_each(self, blocks: Words, entries: Words) -> None:
        for block, entry in zip(blocks.tolist(), entries.tolist(), strict=True):
            self._own_leaf(block >> LEAF_SHIFT)[block & LEAF_MASK] = entry

    def _own_leaf(self, leaf: int) -> array[int]:
        own = self.own.get(leaf)
        if own is None:
            own = self.own[leaf] = ZERO_LEAF[:]
        return own

    def load_leaf(self, record: records.Leaf) -> None:
        """Recovery: set one own leaf."""
        if not record.entries:
            self.own.pop(record.leaf, None)
        elif len(record.entries) != records.LEAF_BYTES:
            raise BadRecord(f"a leaf of {len(record.entries)} bytes")
        else:
            own = self.own[record.leaf] = ZERO_LEAF[:]  # a copy has the size it needs, array("Q", bytes) a 16th more
            memoryview(own).cast("B")[:] = record.entries


class State:
    """What exists: names and layers. Changed by `apply` and by nothing else."""

    def __init__(self, uuid: str = "") -> None:
        """`uuid` of the pool, where it is known: records of any other are refused."""
        self.uuid = uuid
        self.named = False  # a record has said whose all this is; pools of before that record have none
        self.names: dict[str, records.Name] = {}
        self.layers: dict[int, Layer] = {}
        self.next_layer = 1
        self.mergeable: dict[int, None] = {}  # layers without a name and with one child, in order of discovery
        self.prunable: dict[int, None] = {}  # layers that lost their name, or a child, and have several children
        self.unsettled: set[int] = set()  # those of the two that came there since the last commit was packed
        self.sealing: set[int] = set()  # layers sealed since the last commit was packed
        self.snapshots = 0  # names that are snapshots
        self.limited: dict[str, None] = {}  # names with a quota or a reservation
        self.deferred: dict[str, None] = {}  # names of what was removed while it was in use
        self.size = 0  # bytes of data that the pool has grown to; 0: what the superblock says

    def apply(self, record: Record) -> list[Layer]:
        """Make `record` so. Returns the layers that nothing refers to any more: their blocks are the caller's."""
        try:
            match record:
                case records.Entries():
                    self.layers[record.layer].load_entries(record)
                case records.Leaf():
                    self.layers[record.layer].load_leaf(record)
                case records.Layer():
                    return self._set_layer(record)
                case records.Name():
                    return self._set_name(record)
                case records.Unname():
                    row = self.names.pop(record.name)
                    self.limited.pop(record.name, None)
                    self.deferred.pop(record.name, None)
                    self.snapshots -= row.snapshot
                    return self._leave(self.layers[row.layer], record.name)
                case records.Counter():
                    self.next_layer = max(self.next_layer, record.next_layer)
                case records.Size():
                    self.size = record.size
                case records.Uuid():
                    if self.uuid not in ("", record.uuid):
                        raise BadRecord(f"this is of pool {record.uuid}, not of pool {self.uuid}")
                    self.uuid = record.uuid
                    self.named = True
                case records.End():
                    pass
        except KeyError as error:
            raise BadRecord(f"{type(record).__name__} refers to {error}, which does not exist") from error
        return []

    def _set_layer(self, record: records.Layer) -> list[Layer]:
        parent = self.layers[record.parent] if record.parent else None
        self.next_layer = max(self.next_layer, record.layer + 1)
        layer = self.layers.get(record.layer)
        if layer is None:
            layer = self.layers[record.layer] = Layer(record.layer, parent)
            before = None
        else:
            before, layer.parent = layer.parent, parent
            layer.effective_leaves = {}  # where there is no parent, own leaves are the effective ones
        if parent is not None:
            parent.children[layer.number] = layer
        if before is None or before is parent:
            return []
        del before.children[layer.number]
        return self._collapse(before)

    def _set_name(self, record: records.Name) -> list[Layer]:
        layer = self.layers[record.layer]
        before = self.names.get(record.name)
        self.names[record.name] = record
        self.snapshots += record.snapshot - (before.snapshot if before is not None else False)
        if record.quota or record.reservation:
            self.limited[record.name] = None
        else:
            self.limited.pop(record.name, None)
        if records.is_deferred(record.name):
            self.deferred[record.name] = None
        layer.name = record.name
        if layer.head and record.snapshot:
            self.sealing.add(layer.number)
        layer.head = not record.snapshot
        if before is None or before.layer == record.layer:
            return []
        return self._leave(self.layers[before.layer], record.name)

    def _leave(self, layer: Layer, name: str) -> list[Layer]:
        if layer.name != name:  # it has another name by now: a snapshot's, or a new one
            return []
        layer.name = None
        layer.head = False
        return self._collapse(layer)

    def _collapse(self, layer: Layer | None) -> list[Layer]:
        gone = []
        while layer is not None and layer.name is None and not layer.children:
            del self.layers[layer.number]
            self.mergeable.pop(layer.number, None)
            self.prunable.pop(layer.number, None)
            self.unsettled.discard(layer.number)
            gone.append(layer)
            if layer.parent is not None:
                del layer.parent.children[layer.number]
            layer = layer.parent
        if layer is not None and layer.name is None:
            self._unnamed(layer)
            self.unsettled.add(layer.number)
        return gone

    def _unnamed(self, layer: Layer) -> None:
        if len(layer.children) == 1:
            self.prunable.pop(layer.number, None)
            self.mergeable[layer.number] = None
        else:
            self.prunable[layer.number] = None

    def find_unnamed(self) -> None:
        """At load: what is to be merged or pruned; all of it is durable."""
        self.mergeable.clear()
        self.prunable.clear()
        self.unsettled.clear()
        self.sealing.clear()
        for layer in self.layers.values():
            if layer.name is None:
                self._unnamed(layer)

    def snapshot_records(self) -> list[Record]:
        """Names and layers as records, parents first: what a checkpoint starts with."""
        ordered: list[Record] = [records.Counter(self.next_layer)]
        if self.uuid:
            ordered.append(records.Uuid(self.uuid))
        if self.size:
            ordered.append(records.Size(self.size))
        seen: set[int] = set()
        for layer in self.layers.values():
            chain: list[Layer] = []
            node: Layer | None = layer
            while node is not None and node.number not in seen:
                seen.add(node.number)
                chain.append(node)
                node = node.parent
            ordered.extend(
                records.Layer(node.number, node.parent.number if node.parent is not None else 0)
                for node in reversed(chain)
            )
        ordered.extend(self.names.values())
        return ordered

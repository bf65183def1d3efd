"""What a pool is, as far as what is left of its journal can say; and exactly what it cannot.

Recovery (`Pool.open`) applies every record or refuses. This applies what makes sense, in order, and keeps account:

- every entry knows the record that said it last: of two owners of a block the later one keeps it, and the frames are
  named;
- data that is lost reads as zeroes, never as what an older layer holds there;
- where a commit is missing, everything that it could have changed is doubtful until a later record says it again: the
  entries of volumes, and of layers that were being merged; not those of a snapshot that stands on snapshots;
- entries of a layer that a lost commit made, and layers that lost their name with it, are kept under `lost/layer-N`;
- a name that a lost commit removed is back, a name that it made is gone: which ones, nobody can say, and that is said.

Pure, but for reading the frames. Writing is repair.py's.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nbdthin.pool import records
from nbdthin.pool.commands import MAX_VOLUME
from nbdthin.pool.journal import Frame
from nbdthin.pool.layers import FULL, LEAF_MASK, LEAF_SHIFT, SUBBLOCKS, Layer, State, Words, words
from nbdthin.pool.pool import MAX_BLOCKS
from nbdthin.pool.records import LEAF_BLOCKS, LEAF_BYTES, BadRecord, Record
from nbdthin.pool.superblock import Superblock
from nbdthin.pool.survey import Finding, Lost, Survey

Flags = npt.NDArray[np.bool_]

GONE = "lost: it reads as zeroes"
DOUBTFUL = "doubtful: it may be as it was before, or lost"
_MOST_LEAF = MAX_VOLUME >> LEAF_SHIFT  # beyond, no volume of any block size has a leaf


@dataclass(frozen=True, slots=True)
class Loss:
    """What is gone. `name`: of the volume or snapshot, empty for the pool; `length` 0: not a range of it."""

    name: str
    offset: int
    length: int
    what: str

    def __str__(self) -> str:
        if not self.length:
            return f"{self.name}: {self.what}" if self.name else self.what
        return f"{self.name} bytes {self.offset} to {self.offset + self.length - 1}: {self.what}"


class _Said(NamedTuple):
    """From `start` on, records are those of this frame."""

    start: int
    path: Path
    offset: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


class Salvage:
    """Call it with a survey; then `state` is what can be had, `defects` and `losses` what is wrong with the rest."""

    def __init__(self, found: Survey, superblock: Superblock, data_bytes: int | None) -> None:
        """`data_bytes`: what the pool's data really has, None if not known."""
        self.state = State(superblock.uuid)
        self.foreign: Finding | None = None  # where it says that it is of another pool: nothing behind that was read
        self.defects: list[Finding] = []  # records that do not add up, with their place
        self.losses: list[Loss] = []
        self._block_size = superblock.block_size
        self._made_with = superblock.size
        self._data_bytes = data_bytes
        self._journal = found.directory
        self._gaps: list[Lost] = []
        self._said: list[_Said] = []
        self._record = 0  # counts records
        self._origins: dict[int, dict[int, Words]] = {}  # layer -> leaf -> the record that said each entry
        self._clean: dict[int, dict[int, Flags]] = {}  # doubtful layer -> leaf -> blocks said again since
        self._gone: dict[int, dict[int, Words]] = {}  # layer -> leaf -> masks of subblocks whose data is lost
        self._orphans: set[int] = set()  # layers of which a lost commit knew the parent
        for step in found.steps:
            if isinstance(step, Lost):
                self._lose(step)
            else:
                self._apply_frame(step.frame())
            if self.foreign is not None:
                return
        self._settle()

    @property
    def size(self) -> int:
        """Bytes of data that the pool has."""
        return self.state.size or self._made_with

    # -- applying

    def _apply_frame(self, frame: Frame) -> None:
        self._said.append(_Said(self._record, frame.path, frame.offset))
        try:
            decoded = records.decode(frame.payload)
        except BadRecord as error:
            self._defect(str(error))
            self._lose(Lost(frame.sequence, frame.sequence, frame.path, frame.offset))
            return
        for record in decoded:
            if isinstance(record, records.Uuid) and record.uuid != self.state.uuid:
                what = f"this is of pool {record.uuid}, not of pool {self.state.uuid}"
                self.foreign = Finding(frame.path, frame.offset, what)
                self.defects = [self.foreign]
                return
            try:
                self._apply(record)
            except BadRecord as error:
                self._defect(str(error))
                if isinstance(record, records.Name):
                    self._note(record.name, f"its record cannot be used: {error}")
            self._record += 1

    def _apply(self, record: Record) -> None:
        match record:
            case records.Entries():
                self._set_entries(record)
            case records.Leaf():
                self._set_leaf(record)
            case records.Layer():
                self._set_layer(record)
            case records.Name():
                self._set_name(record)
            case records.Size():
                if (
                    record.size % self._block_size
                    or not self._made_with <= record.size <= MAX_BLOCKS * self._block_size
                ):
                    raise BadRecord(f"not a size of the pool: {record.size}")
                self.state.apply(record)
            case records.Unname():
                if record.name in self.state.names or not self._gaps:
                    self._forget(self.state.apply(record))
            case _:
                self.state.apply(record)

    def _forget(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            for notes in (self._origins, self._clean, self._gone):
                notes.pop(layer.number, None)

    def _layer(self, number: int) -> Layer:
        """Layer `number`; made, if a lost commit may have made it."""
        layer = self.state.layers.get(number)
        if layer is None:
            if not self._gaps or not number:
                raise BadRecord(f"layer {number} does not exist")
            self.state.apply(records.Layer(number, 0))
            layer = self.state.layers[number]
            self._orphans.add(number)
            self._clean[number] = {}
        return layer

    def _set_entries(self, record: records.Entries) -> None:
        blocks = np.frombuffer(record.blocks, dtype=np.uint64) if len(record.blocks) % 8 == 0 else None
        if blocks is None or len(record.blocks) != len(record.entries):
            raise BadRecord(f"{len(record.blocks)} bytes of blocks with {len(record.entries)} bytes of entries")
        if len(blocks) and int(blocks.max()) >> LEAF_SHIFT > _MOST_LEAF:
            raise BadRecord(f"an entry of block {int(blocks.max())}")
        layer = self._layer(record.layer)
        layer.load_entries(record)
        origins, clean = self._origins.setdefault(layer.number, {}), self._clean.get(layer.number)
        for leaf in np.unique(blocks >> np.uint64(LEAF_SHIFT)).tolist():
            indices = blocks[blocks >> np.uint64(LEAF_SHIFT) == leaf] & np.uint64(LEAF_MASK)
            origins.setdefault(leaf, np.zeros(LEAF_BLOCKS, dtype=np.uint64))[indices] = self._record
            if clean is not None:
                clean.setdefault(leaf, np.zeros(LEAF_BLOCKS, dtype=np.bool_))[indices] = True

    def _set_leaf(self, record: records.Leaf) -> None:
        if len(record.entries) not in (0, LEAF_BYTES) or record.leaf > _MOST_LEAF:
            raise BadRecord(f"a leaf of {len(record.entries)} bytes, number {record.leaf}")
        layer = self._layer(record.layer)
        layer.load_leaf(record)
        said = np.full(LEAF_BLOCKS, self._record, dtype=np.uint64)
        self._origins.setdefault(layer.number, {})[record.leaf] = said
        if layer.number in self._clean:
            self._clean[layer.number][record.leaf] = np.ones(LEAF_BLOCKS, dtype=np.bool_)

    def _set_layer(self, record: records.Layer) -> None:
        if not record.layer:
            raise BadRecord("a layer with number 0")
        if record.parent:
            node: Layer | None = self._parent(record)
            while node is not None:
                if node.number == record.layer:
                    raise BadRecord(f"layer {record.layer} is its own ancestor")
                node = node.parent
        self._orphans.discard(record.layer)
        self._forget(self.state.apply(record))

    def _parent(self, record: records.Layer) -> Layer:
        try:
            return self._layer(record.parent)
        except BadRecord:  # its own entries can be had all the same
            if record.layer not in self.state.layers:
                self.state.apply(records.Layer(record.layer, 0))
                self._orphans.add(record.layer)
            raise

    def _set_name(self, record: records.Name) -> None:
        layer = self._layer(record.layer)
        before = self.state.names.get(record.name)
        if before is not None and before.layer != layer.number and layer.number in self._orphans:
            # The lost commit may have given the old layer to a snapshot.
            left = self.state.layers[before.layer]
            if left.name == record.name:
                self._keep(left, before.size)
        self._forget(self.state.apply(record))

    # -- a gap

    def _lose(self, lost: Lost) -> None:
        self._gaps.append(lost)
        for layer in self.state.layers.values():
            if self._may_have_changed(layer, lost):
                self._clean[layer.number] = {}
        names = sorted(self.state.names)
        if names:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            self._note("", f"{lost}: what it removed or renamed is back as it was; it may be any of {shown}")
        self._note("", f"{lost}: what it made, and sizes and labels that it set, are not known")

    def _may_have_changed(self, layer: Layer, lost: Lost) -> bool:
        """Only heads are written. Merging changes a layer without a name and the one on it; two commits in a row can
        take the name away and merge."""
        if layer.name is None or layer.head:
            return True
        parent = layer.parent
        return parent is not None and (parent.name is None or not lost.only_one or len(self._gaps) > 1)

    # -- making it add up

    def _settle(self) -> None:
        self._settle_names()
        self._settle_unreachable()
        self._settle_entries()
        for number in sorted(self._orphans & self.state.layers.keys()):
            layer = self.state.layers[number]
            what = f"what layer {number} stood on is not known: where it holds nothing of its own, it reads as zeroes"
            for name in _names_above(layer):
                self._note(name, what)
        for name in sorted(self.state.names):
            self.losses.extend(self._ranges(name))

    def _settle_names(self) -> None:
        """A layer has one name; nothing stands on a head."""
        state = self.state
        for name, row in sorted(state.names.items()):
            layer = state.layers[row.layer]
            if layer.name != name:
                self._defect(f"{name!r} and {layer.name!r} are both layer {layer.number}", self._journal)
                if layer.name is None or layer.name not in state.names:
                    layer.name, layer.head = name, not row.snapshot
                else:
                    self._move_to_new_head(row)
        for _name, row in sorted(state.names.items()):
            layer = state.layers[row.layer]
            if not row.snapshot and layer.children:
                if not self._gaps:
                    self._defect(f"volume {row.name!r} has layers on top of its head", self._journal)
                self._move_to_new_head(row)

    def _move_to_new_head(self, row: records.Name) -> None:
        """What `row` reads stays the same: it stands on its layer now, instead of being it."""
        state = self.state
        number = state.next_layer
        state.apply(records.Layer(number, row.layer))
        layer = state.layers[row.layer]
        if layer.name == row.name:
            layer.name, layer.head = None, False
        state.apply(row._replace(layer=number))

    def _settle_unreachable(self) -> None:
        state = self.state
        while True:
            found = [layer for layer in state.layers.values() if layer.name is None and not layer.children]
            if not found:
                return
            for layer in found:
                said = [int(leaf.max()) for leaf in self._origins.get(layer.number, {}).values()]
                if not self._gaps:
                    place = self._frame_of(max(said)) if said else None
                    self._defect(f"layer {layer.number} is reached by no name", place and place.path, place)
                if any(words(own).any() for own in layer.own.values()):
                    self._keep(layer, 0)
                else:
                    self._drop(layer)

    def _drop(self, layer: Layer) -> None:
        del self.state.layers[layer.number]
        if layer.parent is not None:
            layer.parent.children.pop(layer.number, None)

    def _keep(self, layer: Layer, size: int) -> None:
        """Give `layer` a name, so that what it holds can be had."""
        name = f"lost/layer-{layer.number}"
        while name in self.state.names:
            name += "-"
        end = max((_end_of(leaf, own) for leaf, own in layer.own.items()), default=0) * self._block_size
        size = min(max(size, end, self._block_size), MAX_VOLUME)
        self.state.apply(records.Name(name, True, layer.number, size, time.time(), {}))
        self._note(name, "a layer whose name is lost; its size is a guess")

    def _settle_size(self) -> None:
        """A lost commit may have said that the pool has grown: what is in use and in the data belongs to it."""
        if not self._gaps or self._data_bytes is None:
            return
        used = [words(own) >> np.uint64(32) for layer in self.state.layers.values() for own in layer.own.values()]
        physical = np.concatenate(used) if used else np.empty(0, dtype=np.uint64)
        inside = physical[physical < self._data_bytes // self._block_size]
        size = (int(inside.max()) + 1) * self._block_size if len(inside) else 0
        if self.size < size <= MAX_BLOCKS * self._block_size:
            self.state.apply(records.Size(size))
            self._note("", f"the pool's size: it had grown, and is {size} bytes now, as far as blocks are in use")

    def _settle_entries(self) -> None:
        self._settle_size()
        for layer in self.state.layers.values():
            for leaf in layer.own:
                self._settle_masks(layer, leaf)
        self._settle_owners()
        if self._data_bytes is not None and self._data_bytes < self.size:
            self._settle_cut_data(self._data_bytes)

    def _settle_masks(self, layer: Layer, leaf: int) -> None:
        entries = words(layer.own[leaf])
        data, zero, physical = entries & FULL, entries >> np.uint64(16) & FULL, entries >> np.uint64(32)
        for what, bad in (
            ("is data and zero at once", data & zero != 0),
            ("has data in no block", (data != 0) & (physical == 0)),
            ("lies outside the pool", physical >= self.size // self._block_size),
        ):
            for index in np.flatnonzero(bad & (entries != 0)).tolist():
                self._defect_at(layer, leaf, index, what)
                self._clear(layer, leaf, index)
            entries = words(layer.own[leaf])

    def _settle_owners(self) -> None:
        """Of several entries that name one block, the one said last keeps it."""
        parts = []
        for layer in self.state.layers.values():
            for leaf, own in layer.own.items():
                physical = words(own) >> np.uint64(32)
                indices = np.flatnonzero(physical)
                part = np.empty((len(indices), 4), dtype=np.uint64)
                part[:, 0], part[:, 1] = physical[indices], self._said_at(layer, leaf)[indices]
                part[:, 2], part[:, 3] = layer.number, (leaf << LEAF_SHIFT) + indices
                parts.append(part)
        if not parts:
            return
        table = np.concatenate(parts)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        for index in np.flatnonzero(table[1:, 0] == table[:-1, 0]).tolist():
            physical, _, number, block = table[index].tolist()
            layer, winner = self.state.layers[number], table[index + 1].tolist()
            what = f"shares physical block {physical} with block {winner[3]} of layer {winner[2]}: it has two owners"
            if not self._gaps:
                what += f" ({self._frame_of(winner[1])} says the other)"
            self._defect_at(layer, block >> LEAF_SHIFT, block & LEAF_MASK, what)
            self._clear(layer, block >> LEAF_SHIFT, block & LEAF_MASK)

    def _settle_cut_data(self, end: int) -> None:
        """The data ends before the pool does: what was behind reads as zeroes once the file has its size again."""
        sub = self._block_size // SUBBLOCKS
        for layer in self.state.layers.values():
            for leaf, own in layer.own.items():
                entries = words(own)
                first = np.maximum(0, end - (entries >> np.uint64(32)).astype(np.int64) * self._block_size) // sub
                kept = (np.uint64(1) << np.minimum(first, SUBBLOCKS).astype(np.uint64)) - np.uint64(1)
                gone = entries & FULL & ~kept
                if gone.any():
                    self._gone.setdefault(layer.number, {}).setdefault(leaf, _no_masks())[:] |= gone

    def _clear(self, layer: Layer, leaf: int, index: int) -> None:
        """The entry cannot be kept: its data is lost, and reads as zeroes."""
        own = layer.own[leaf] = layer.own[leaf][:]
        entry = own[index]
        data = entry & FULL
        own[index] = (data | entry >> 16 & FULL) << 16
        self._gone.setdefault(layer.number, {}).setdefault(leaf, _no_masks())[index] |= np.uint64(data)

    # -- saying it

    def _note(self, name: str, what: str) -> None:
        loss = Loss(name, 0, 0, what)
        if loss not in self.losses:
            self.losses.append(loss)

    def _defect(self, what: str, path: Path | None = None, place: _Said | None = None) -> None:
        place = place or (self._said[-1] if path is None else None)
        if place is None:
            self.defects.append(Finding(path or self._journal, None, what))
        else:
            self.defects.append(Finding(place.path, place.offset, what))

    def _defect_at(self, layer: Layer, leaf: int, index: int, what: str) -> None:
        place = self._frame_of(int(self._said_at(layer, leaf)[index]))
        block = (leaf << LEAF_SHIFT) + index
        names = ", ".join(sorted(_names_above(layer))) or "nothing"
        self._defect(f"block {block} of layer {layer.number} {what}; it concerns {names}", place=place)

    def _said_at(self, layer: Layer, leaf: int) -> Words:
        return self._origins.get(layer.number, {}).get(leaf, _no_masks())

    def _frame_of(self, record: int) -> _Said:
        return self._said[bisect_right(self._said, record, key=lambda said: said.start) - 1]

    def _ranges(self, name: str) -> Iterator[Loss]:
        """Where `name` does not read as it should, or may not."""
        row = self.state.names[name]
        chain = list(_chain(self.state.layers[row.layer]))
        leaves = {leaf for layer in chain for leaf in (*layer.own, *self._clean.get(layer.number, ()))}
        doubtful = any(layer.number in self._clean or layer.number in self._orphans for layer in chain)
        if not doubtful and not any(layer.number in self._gone for layer in chain):
            return
        ranges: list[tuple[int, int, int]] = []
        leaf_bytes = LEAF_BLOCKS * self._block_size
        position = 0
        for leaf in sorted(leaves):
            if doubtful:
                _add(ranges, position, leaf * leaf_bytes, 1)
            kinds = self._kinds(chain, leaf)
            starts = np.flatnonzero(np.diff(kinds, prepend=-1)).tolist()
            for start, stop in zip(starts, [*starts[1:], LEAF_BLOCKS], strict=True):
                base = leaf * leaf_bytes
                _add(ranges, base + start * self._block_size, base + stop * self._block_size, int(kinds[start]))
            position = (leaf + 1) * leaf_bytes
        if doubtful:
            _add(ranges, position, row.size, 1)
        for first, end, kind in ranges:
            if first < row.size:
                yield Loss(name, first, min(end, row.size) - first, GONE if kind == 2 else DOUBTFUL)

    def _kinds(self, chain: list[Layer], leaf: int) -> npt.NDArray[np.int8]:
        """For each block of a leaf: 2 some of its data is lost, 1 doubtful, 0 sound."""
        open_ = np.full(LEAF_BLOCKS, FULL, dtype=np.uint64)
        kinds = np.zeros(LEAF_BLOCKS, dtype=np.int8)
        for layer in chain:
            clean = self._clean.get(layer.number)
            if clean is not None:
                said = clean.get(leaf)
                kinds[(open_ != 0) & (True if said is None else ~said) & (kinds == 0)] = 1
            gone = self._gone.get(layer.number, {}).get(leaf)
            if gone is not None:
                kinds[open_ & gone != 0] = 2
            own = layer.own.get(leaf)
            if own is not None:
                entries = words(own)
                open_ &= ~(entries | entries >> np.uint64(16))
        if chain[-1].number in self._orphans:
            kinds[(open_ != 0) & (kinds == 0)] = 1
        return kinds


def _no_masks() -> Words:
    return np.zeros(LEAF_BLOCKS, dtype=np.uint64)


def _end_of(leaf: int, own: object) -> int:
    """The block behind the last entry of a leaf."""
    found = np.flatnonzero(words(own))  # type: ignore[arg-type]
    return (leaf << LEAF_SHIFT) + int(found[-1]) + 1 if len(found) else 0


def _chain(layer: Layer) -> Iterator[Layer]:
    node: Layer | None = layer
    while node is not None:
        yield node
        node = node.parent


def _names_above(layer: Layer) -> Iterator[str]:
    """The names whose content includes `layer`."""
    todo = [layer]
    while todo:
        node = todo.pop()
        if node.name is not None:
            yield node.name
        todo.extend(node.children.values())


def _add(ranges: list[tuple[int, int, int]], start: int, end: int, kind: int) -> None:
    if start >= end or not kind:
        return
    if ranges and ranges[-1][1:] == (start, kind):
        ranges[-1] = (ranges[-1][0], end, kind)
    else:
        ranges.append((start, end, kind))

"""Does a pool add up? The same questions for `nbdthin check POOL`, which asks the files, and for every test, which asks
the open pool: its caches and counters are held against what follows from the entries alone, and its memory against
what its journal would bring back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nbdthin.errors import Corrupt, Invalid
from nbdthin.pool import allocator
from nbdthin.pool.journal import Frame, Journal
from nbdthin.pool.layers import FULL, LEAF_MASK, LEAF_SHIFT, SUBBLOCKS, Layer, State, Words, are_mixed, words
from nbdthin.pool.pool import REPAIRED, Pool
from nbdthin.pool.records import LEAF_BLOCKS, decode, is_deferred
from nbdthin.pool.repair import Identity, examine, identify, locked
from nbdthin.pool.sums import leaf_of
from nbdthin.pool.survey import Finding, Survey, survey
from nbdthin.pool.unsynced import count


@dataclass(frozen=True, slots=True)
class Report:
    """What a check looked at and what it found; `problems` is empty for a sound pool."""

    path: Path
    names: int
    layers: int
    blocks: int  # mapped
    frames: int  # sequence number of the last journal frame
    problems: tuple[str, ...]
    notes: tuple[str, ...]  # what is odd and harms nothing


def check_path(path: Path | str, *, data: Path | str | None = None) -> Report:
    """Check the pool at `path`, which must not be in use; writes nothing. Raises NotFound, Locked or OSError.

    All that is wrong is found in one run, as far as one thing does not hide another. `data`: where the data is, when
    the superblock cannot say.
    """
    path = Path(path)
    with locked(path):
        try:
            identity = identify(path, None if data is None else Path(data))
        except Corrupt as error:
            return Report(path, 0, 0, 0, 0, (str(error),), ())
        found = survey(path / "journal")
        notes = tuple(str(finding) for finding in found.findings if finding.harmless)
        if identity.findings or found.damage:
            return _report_damage(path, identity, found, notes)
    try:
        pool = Pool.open(path, inspect=True)
    except (Corrupt, Invalid) as error:
        with locked(path):
            return _report_damage(path, identity, found, notes, str(error))
    with closing(pool):
        state, sequence = pool.state, pool.journal.sequence
        wrong = tuple(check(pool))
        used = pool.allocator.used
        notes += tuple(_notes(pool))
        names, layers = len(state.names), len(state.layers)
        try:
            recovered = pool.read_unsynced()
            pool.apply_recovered(recovered)  # last of all: opening would refuse what cannot be applied
        except Corrupt as error:
            wrong += (str(error),)
        else:
            if answered := count(recovered):
                notes += (f"{path / 'journal'}: answered changes that a kill left, taken over by opening: {answered}",)
    if wrong:
        with locked(path):
            return _report_damage(path, identity, found, notes, *wrong)
    return Report(path, names, layers, used, sequence, (), notes)


def _report_damage(path: Path, identity: Identity, found: Survey, notes: tuple[str, ...], *more: str) -> Report:
    """Everything that is wrong. `more`, what the strict reader says, counts where nothing else says where it is."""
    names = layers = blocks = 0
    defects: list[Finding] = []
    if identity.superblock is not None and not found.empty and found.later is None:
        salvage = examine(found, identity)
        defects, state = salvage.defects, salvage.state
        names, layers = len(state.names), len(state.layers)
        blocks = sum(len(layer.physical_blocks()) for layer in state.layers.values())
    problems = tuple(dict.fromkeys(str(finding) for finding in (*identity.findings, *found.damage, *defects)))
    return Report(path, names, layers, blocks, found.last, problems or more, notes)


def _notes(pool: Pool) -> Iterator[str]:
    """What an administrator may want to know of a pool without problems."""
    if not pool.state.named:
        yield f"{pool.path / 'journal'}: it does not say which pool it is of, so that was not checked (an old pool)"
    if (pool.path / REPAIRED).exists():
        yield f"{pool.path / REPAIRED}: what a repair has lost; its blocks are not swept (`nbdthin repair --release`)"
    if pool.state.deferred:
        yield f"{pool.path}: removed while in use, to be freed by who serves it next: {len(pool.state.deferred)}"
    place = pool.path / "sums"
    if pool.sums_lost:
        yield f"{place} is missing: checksums of what is sealed are computed anew, from what the disk has then"
    elif damaged := _damaged_sums(pool):
        yield f"{place}: records that are torn or damaged: {damaged}; they are computed anew, from the disk"


def _damaged_sums(pool: Pool) -> int:
    sealed = [layer for layer in pool.state.layers.values() if not layer.head]
    return sum(pool.sums.damaged(leaf_of(layer, leaf).blocks) for layer in sealed for leaf in layer.own)


def check(pool: Pool) -> list[str]:
    """Everything wrong with an open pool, a sentence each."""
    problems = [*links(pool.state), *_entries(pool), *_caches(pool.state), *_space(pool)]
    if not pool.has_changes and pool.failed is None:
        problems.extend(_journal(pool))
    return problems


def links(state: State) -> Iterator[str]:
    for name, row in state.names.items():
        layer = state.layers.get(row.layer)
        if layer is None:
            yield f"{name!r} refers to layer {row.layer}, which does not exist"
        elif layer.name != name or layer.head == row.snapshot:
            yield f"layer {layer.number} does not know that it is {name!r}"
        elif not row.snapshot and layer.children:
            yield f"volume {name!r} has layers on top of its head"
        if row.snapshot and (row.quota or row.reservation):
            yield f"snapshot {name!r} has a quota or a reservation, which only volumes have"
        if not row.snapshot and row.origin >= row.layer:
            yield f"volume {name!r} has layer {row.layer} and starts from layer {row.origin}, which is no older"
    nameless = {number for number, layer in state.layers.items() if layer.name is None}
    for layer in state.layers.values():
        if layer.parent is not None and state.layers.get(layer.parent.number) is not layer.parent:
            yield f"layer {layer.number} stands on layer {layer.parent.number}, which does not exist"
        if layer.number >= state.next_layer:
            yield f"layer {layer.number} is not below the counter {state.next_layer}"
        if layer.number in nameless and not layer.children:
            yield f"layer {layer.number} is reached by no name"
        for number, child in layer.children.items():
            if child.parent is not layer or state.layers.get(number) is not child:
                yield f"layer {layer.number} wrongly counts layer {number} as its child"
        if layer.parent is not None and layer.number not in layer.parent.children:
            yield f"layer {layer.parent.number} does not know its child {layer.number}"
    wanted = {number for number in nameless if len(state.layers[number].children) == 1}
    if set(state.mergeable) != wanted:
        yield f"layers to be merged: {sorted(wanted)}, listed are {sorted(state.mergeable)}"
    if state.snapshots != sum(row.snapshot for row in state.names.values()):
        yield f"{state.snapshots} snapshots are counted"
    if state.deferred.keys() != {name for name in state.names if is_deferred(name)}:
        yield f"removed while in use are counted: {', '.join(state.deferred) or 'none'}"
    yield from _cycles(state)


def _cycles(state: State) -> Iterator[str]:
    sound: set[int] = set()
    for layer in state.layers.values():
        path: set[int] = set()
        node: Layer | None = layer
        while node is not None and node.number not in sound:
            if node.number in path:
                yield f"layer {node.number} is its own ancestor"
                return
            path.add(node.number)
            node = node.parent
        sound |= path


def _entries(pool: Pool) -> Iterator[str]:
    total = pool.allocator.total
    for layer in pool.state.layers.values():
        owned = 0
        for leaf, own in layer.own.items():
            if len(own) != LEAF_BLOCKS:
                yield f"leaf {leaf} of layer {layer.number} has {len(own)} entries"
                continue
            entries = words(own)
            data, zero = entries & FULL, entries >> np.uint64(16) & FULL
            physical = entries >> np.uint64(32)
            owned += int(np.count_nonzero(physical))
            for what, bad in (
                ("is data and zero at once", data & zero != 0),
                ("has data in no block", (data != 0) & (physical == 0)),
                ("lies outside the pool", physical >= total),
            ):
                for index in np.flatnonzero(bad).tolist():
                    yield f"block {(leaf << LEAF_SHIFT) + index} of layer {layer.number} {what}"
        if owned != layer.blocks:
            yield f"layer {layer.number} owns {owned} blocks and counts {layer.blocks}"


def _caches(state: State) -> Iterator[str]:
    for layer in state.layers.values():
        parent = layer.parent
        if parent is not None and not layer.own and layer.effective_leaves is parent.effective_leaves:
            continue  # what shows the same has the same caches
        for leaf, effective in layer.effective_leaves.items():
            entries = words(effective)
            data = _bits(entries)
            said = np.where(data, (entries >> np.uint64(32))[:, None], np.uint64(0))
            tells = data | ~are_mixed(entries)[:, None]
            stale = (tells & (said != sources(layer, leaf))).any(axis=1)
            for index in np.flatnonzero(stale).tolist():
                yield f"the effective entry of block {(leaf << LEAF_SHIFT) + index} of layer {layer.number} is stale"
        for block, physical in layer.mixed.items():
            if physical != tuple(sources(layer, block >> LEAF_SHIFT)[block & LEAF_MASK].tolist()):
                yield f"the resolved block {block} of layer {layer.number} is stale"


def _bits(masks: Words) -> npt.NDArray[np.bool_]:
    """The low bits of each mask, a column a subblock."""
    return (masks[:, None] >> np.arange(SUBBLOCKS, dtype=np.uint64) & np.uint64(1)).astype(np.bool_)


def sources(layer: Layer, leaf: int) -> Words:
    """The physical block of every subblock of a leaf, 0 where it reads as zero: by the definition and nothing else."""
    result = np.zeros((LEAF_BLOCKS, SUBBLOCKS), dtype=np.uint64)
    missing = np.ones((LEAF_BLOCKS, SUBBLOCKS), dtype=np.bool_)
    node: Layer | None = layer
    while node is not None:
        own = node.own.get(leaf)
        if own is not None:
            entries = words(own)
            data, zero = _bits(entries), _bits(entries >> np.uint64(16))
            result = np.where(missing & data, (entries >> np.uint64(32))[:, None], result)
            missing &= ~(data | zero)
        node = node.parent
    return result


def _space(pool: Pool) -> Iterator[str]:
    space = pool.allocator
    owned = np.zeros(space.total, dtype=np.bool_)
    for layer in pool.state.layers.values():
        for part in layer.physical_parts():
            blocks, counts = np.unique(part[part < space.total], return_counts=True)
            for block in blocks[(counts > 1) | owned[blocks]].tolist():
                yield f"physical block {block} has two owners"
            owned[blocks] = True
    owned[: allocator.HEADER_BLOCKS] = True
    states = space.states()
    marked = states == allocator.USED
    for block in np.flatnonzero(owned & ~marked).tolist():
        yield f"physical block {block} is in use and not marked so"
    for block in np.flatnonzero(marked & ~owned).tolist():
        yield f"physical block {block} is marked in use and has no owner"
    used = int(np.count_nonzero(owned)) - allocator.HEADER_BLOCKS
    if space.used != used:
        yield f"{used} blocks are in use, {space.used} are counted"
    if space.pending != int(np.count_nonzero(states == allocator.PENDING)):
        yield f"{space.pending} freed blocks are counted as pending"


def _journal(pool: Pool) -> Iterator[str]:
    """What the files say must be what memory says."""
    stored = State(pool.superblock.uuid)

    def replay(frame: Frame) -> None:
        for record in decode(frame.payload):
            stored.apply(record)

    Journal(pool.path / "journal").load(replay, repair_tail=False)
    state = pool.state
    if stored.names != state.names:
        yield "the journal holds other names"
    if stored.next_layer != state.next_layer:
        yield "the journal holds another counter"
    if stored.size != state.size:
        yield "the journal holds another size"
    if stored.layers.keys() != state.layers.keys():
        yield "the journal holds other layers"
        return
    for number, layer in state.layers.items():
        other = stored.layers[number]
        if (other.parent and other.parent.number) != (layer.parent and layer.parent.number):
            yield f"the journal gives layer {number} another parent"
        for leaf in layer.own.keys() | other.own.keys():
            mine, theirs = layer.own.get(leaf), other.own.get(leaf)
            if mine != theirs and any(mine or ()) | any(theirs or ()):
                yield f"the journal holds another leaf {leaf} of layer {number}"

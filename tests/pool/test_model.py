"""Any sequence of operations against an oracle that keeps each volume as bytes, and checks after every one of them.

The oracle knows nothing of blocks, masks or layers but this: a subblock *holds data* from the first write that touches
it until it is trimmed or zeroed as a whole, a clone or snapshot starts with what its source holds, and what a name was
changed in since it parted from another is where `diff` may look. Space is held against its definition: the blocks that
reads lead to, and what a copy of the pool gives back when the name is removed from it.

Deterministic; NBDTHIN_LONG=1 searches longer and elsewhere, and prints how to replay what it finds.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdthin.errors import Invalid, NoSpace
from nbdthin.pool import extents, merge
from nbdthin.pool.check import check
from nbdthin.pool.commands import Create, Remove, Rename, Resize, Snapshot
from nbdthin.pool.layers import LEAF_MASK, LEAF_SHIFT, SUBBLOCKS, Layer
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import LEAF_BLOCKS, Name, is_deferred
from nbdthin.pool.rows import Row
from nbdthin.pool.volume import Volume
from nbdthin.units import KiB

from .conftest import FIXED, chain, kill, walk

LONG = os.environ.get("NBDTHIN_LONG") == "1"
MOST_NAMES = 7

Measure = tuple[int, int, int]  # blocks, subblocks, bytes


@dataclass(eq=False)
class Age:
    """The time in which a name was the one to be written; the oracle's notion of a layer, never merged."""

    before: Age | None
    touched: set[int] = field(default_factory=set)  # subblocks


@dataclass
class Image:
    """What a volume or snapshot is to its user."""

    size: int
    held: dict[int, bytes]  # subblock -> its bytes; what is not here reads as zero
    age: Age
    snapshot: bool = False

    def copy(self) -> Image:
        return replace(self, held=dict(self.held))


class Oracle:
    def __init__(self, subblock: int) -> None:
        self.sub = subblock
        self.images: dict[str, Image] = {}
        self.seen: dict[str, dict[int, set[bytes]]] = {}  # values of subblocks that no commit has settled yet

    def writable(self) -> list[str]:
        """Also what was removed while it was in use."""
        return sorted(name for name, image in self.images.items() if not image.snapshot)

    def volumes(self) -> list[str]:
        return [name for name in self.writable() if not is_deferred(name)]

    def snapshots(self) -> list[str]:
        return sorted(name for name, image in self.images.items() if image.snapshot and not is_deferred(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        image, sub = self.images[name], self.sub
        first, last = offset // sub, -(-(offset + length) // sub)
        whole = b"".join(image.held.get(number, bytes(sub)) for number in range(first, last))
        return whole[offset - first * sub :][:length]

    def write(self, name: str, offset: int, payload: bytes) -> None:
        image = self.images[name]
        for number, start, stop in self._parts(offset, len(payload)):
            old = image.held.get(number, bytes(self.sub))
            at = number * self.sub
            image.held[number] = old[: start - at] + payload[start - offset : stop - offset] + old[stop - at :]
            self._touch(name, image, number)

    def zero(self, name: str, offset: int, length: int, *, parts: bool) -> None:
        """Zero whole subblocks; with `parts` also the bytes of those that the range covers in part."""
        image = self.images[name]
        for number, start, stop in self._parts(offset, length):
            at = number * self.sub
            if number not in image.held:
                continue
            if start == at and (stop == at + self.sub or stop == image.size):
                del image.held[number]
            elif parts:
                old = image.held[number]
                image.held[number] = old[: start - at] + bytes(stop - start) + old[stop - at :]
            else:
                continue
            self._touch(name, image, number)

    def resize(self, name: str, size: int) -> None:
        image = self.images[name]
        for number in [number for number in image.held if (number + 1) * self.sub > size]:
            inside = size - number * self.sub
            if inside <= 0:
                del image.held[number]
            else:
                image.held[number] = image.held[number][:inside].ljust(self.sub, b"\0")
            self._touch(name, image, number)
        image.size = size

    def rename(self, old: str, new: str) -> None:
        self.images[new] = self.images.pop(old)
        self.seen[new] = self.seen.setdefault(old, {})  # one for both: a crash may bring the old name back

    def _touch(self, name: str, image: Image, number: int) -> None:
        image.age.touched.add(number)
        values = self.seen.setdefault(name, {}).setdefault(number, set())
        values.add(image.held.get(number, bytes(self.sub)))

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(subblock, start, stop) of a range's pieces."""
        end = offset + length
        while offset < end:
            number = offset // self.sub
            stop = min(end, (number + 1) * self.sub)
            yield number, offset, stop
            offset = stop


@dataclass
class Reader:
    """A read that takes its time."""

    epoch: int
    name: str
    volume: Volume
    segments: list[tuple[int, int]]
    expected: bytes


# Where in a volume, in units that fall on and beside every boundary there is.
blocks = st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, 5, 9])
subs = st.integers(0, SUBBLOCKS - 1)
jitter = st.sampled_from([0, 0, 0, 1, 511, 512, 513])
lengths = st.sampled_from(
    [(0, 1, 0), (0, 1, 0), (0, 0, 512), (0, 0, 1), (0, 3, 7), (1, 0, 0), (1, 0, 0), (1, 0, 1), (2, 5, 0), (3, 0, 0)]
)
far = st.sampled_from([*range(3), LEAF_BLOCKS - 1, LEAF_BLOCKS, LEAF_BLOCKS + 1, 2 * LEAF_BLOCKS - 1, 2 * LEAF_BLOCKS])
places = st.tuples(blocks, st.just(0), st.just(0)) | st.tuples(blocks | far, subs, jitter)
kinds = st.sampled_from(["write", "write", "write", "short", "trim", "zero", "allocate"])
works = st.lists(st.tuples(kinds, places, lengths), min_size=1, max_size=4)
which = st.integers(0, 9)
sizes = st.sampled_from([(3, 0, 0), (1, 0, 0), (5, 3, 512), (0, 1, -512), (4, 0, 1024), (2, 8, -1024)])
LARGE = (2 * LEAF_BLOCKS + 3, 1, 512)


class Machine(RuleBasedStateMachine):
    pool: Pool
    oracle: Oracle

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="nbdthin-model-"))
        self.path = self.directory / "pool"
        self.count = 0
        self.durable: dict[str, Image] = {}
        self.reader: Reader | None = None

    @initialize(block_size=st.sampled_from([16 * KiB, 64 * KiB]), size=st.sampled_from([16, 24, 64, 64]))
    def start(self, block_size: int, size: int) -> None:
        Pool.init(self.path, size=size * block_size, block_size=block_size)
        self.open()
        self.oracle = Oracle(block_size // SUBBLOCKS)
        self.create((5, 3, 512))
        self.io(0, [("write", (0, 0, 0), (2, 7, 0)), ("write", (3, 0, 5), (0, 0, 512))])
        self.snapshot(0)
        self.io(
            0, [("write", (0, 2, 0), (0, 3, 0)), ("write", (1, 7, 100), (0, 0, 512)), ("trim", (2, 0, 0), (0, 3, 0))]
        )
        self.snapshot(0)
        self.clone(1, 0)
        self.commit()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
        shutil.rmtree(self.directory)

    # -- choosing

    @property
    def block(self) -> int:
        return self.pool.block_size

    def bytes_of(self, measure: Measure) -> int:
        whole, part, rest = measure
        return whole * self.block + part * self.oracle.sub + rest

    def fresh_name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def volume_name(self, index: int) -> str:
        names = self.oracle.volumes()
        return names[index % len(names)]

    def snapshot_name(self, index: int) -> str:
        names = self.oracle.snapshots()
        return names[index % len(names)]

    def visible_name(self, index: int) -> str:
        names = [name for name in sorted(self.oracle.images) if not is_deferred(name)]
        return names[index % len(names)]

    def any_name(self, index: int) -> str:
        names = sorted(self.oracle.images)
        return names[index % len(names)]

    def clip(self, name: str, place: Measure, length: int) -> tuple[int, int]:
        """A range of about that place and length inside a volume."""
        size = self.oracle.images[name].size
        offset = self.bytes_of(place) % size
        return offset, min(length, size - offset)

    def has_room(self) -> bool:
        return len(self.oracle.images) < MOST_NAMES

    def has_volume(self) -> bool:
        return bool(self.oracle.volumes())

    def has_snapshot(self) -> bool:
        return bool(self.oracle.snapshots())

    def has_visible(self) -> bool:
        return bool(self.oracle.volumes() or self.oracle.snapshots())

    def has_deferred(self) -> bool:
        return any(map(is_deferred, self.oracle.images))

    # -- refusals for want of space

    def attempt(self, work: Callable[[], None], needs: int | None = None, name: str = "") -> bool:
        """Do `work`; refused, it must have changed nothing. `needs`: blocks that volume `name` must get for it."""
        before = self.accounting()
        room = self.room(name)
        try:
            work()
        except NoSpace:
            assert self.accounting() == before
            assert needs is None or needs > room, f"refused with {room} free blocks, {needs} are needed"
            return False
        assert needs is None or needs <= room
        return True

    def room(self, name: str) -> int:
        """Blocks that volume `name` may take, by the definition of quota and reservation."""
        rows = [row for row in self.pool.state.names.values() if not row.snapshot]
        bounds = [self.pool.allocator.free - self.pool.allocator.pending]
        for row in rows:
            if row.name != name:
                bounds[0] -= max(-(-row.reservation // self.block) - self.charged(row), 0)
            elif row.quota:
                bounds.append(row.quota // self.block - self.charged(row))
        return max(min(bounds), 0)

    def charged(self, row: Name) -> int:
        layers = chain(self.pool.state.layers[row.layer])
        return sum(len(layer.physical_blocks()) for layer in layers if layer.number > row.origin)

    def accounting(self) -> tuple[list[Row], int, int]:
        return self.pool.list(), self.pool.allocator.used, self.pool.allocator.pending

    def lacking(self, name: str, offset: int, length: int) -> int:
        """Blocks in a range that the volume has none of its own for."""
        layer = self.pool.volume(name).layer
        if not length:
            return 0
        return sum(
            not layer.entry(block) >> 32
            for block in range(offset // self.block, (offset + length - 1) // self.block + 1)
        )

    # -- I/O

    def io(self, index: int, work: list[tuple[str, Measure, Measure]]) -> None:
        if names := self.oracle.writable():
            name = names[index % len(names)]
            for kind, place, measure in work:
                self.change(name, kind, *self.clip(name, place, self.bytes_of(measure)))

    # Three times, as a rule is chosen before its arguments: most steps are to be these.
    io_first = rule(index=which, work=works)(io)
    io_second = rule(index=which, work=works)(io)
    io_third = rule(index=which, work=works)(io)

    def change(self, name: str, kind: str, offset: int, length: int) -> None:
        volume = self.pool.volume(name)
        if kind == "trim":
            volume.trim(offset, length)
            self.oracle.zero(name, offset, length, parts=False)
        elif kind in ("zero", "allocate"):
            allocate = kind == "allocate"
            needs = self.lacking(name, offset, length) if allocate else None
            if self.attempt(lambda: volume.write_zeroes(offset, length, allocate=allocate), needs, name):
                self.oracle.zero(name, offset, length, parts=True)
        else:
            self.write(name, offset, length, short=kind == "short")

    def write(self, name: str, offset: int, length: int, short: bool) -> None:
        self.count += 1
        payload = random.Random(self.count).randbytes(length)
        volume = self.pool.volume(name)

        def work() -> None:
            if not (short and volume.write_small(offset, memoryview(payload))):
                volume.write(offset, payload)

        if self.attempt(work, self.lacking(name, offset, length), name):
            self.oracle.write(name, offset, payload)

    @precondition(has_volume)
    @rule(index=which, place=places, leaves=st.sampled_from([1, 2]), kind=st.sampled_from(["trim", "zero"]))
    def clear_leaves(self, index: int, place: Measure, leaves: int, kind: str) -> None:
        name = self.volume_name(index)
        self.change(name, kind, *self.clip(name, place, leaves * LEAF_BLOCKS * self.block))

    # -- structure

    @precondition(has_room)
    @rule(size=sizes | st.just(LARGE))
    def create(self, size: Measure) -> None:
        name = self.fresh_name()
        self.pool.create(name, self.bytes_of(size))
        self.oracle.images[name] = Image(self.bytes_of(size), {}, Age(None))

    @precondition(has_volume)
    @rule(index=which, kind=st.sampled_from(["quota", "reserve"]), blocks=st.sampled_from([0, 1, 4, 7, 12]))
    def limit(self, index: int, kind: str, blocks: int) -> None:
        name = self.volume_name(index)
        size = blocks * self.block - 100 if blocks else None
        try:
            (self.pool.quota if kind == "quota" else self.pool.reserve)(name, size)
        except Invalid:
            row = self.pool.state.names[name]
            assert (row.reservation > (size or 0)) if kind == "quota" else ((size or 0) > row.quota > 0)
        except NoSpace:
            assert kind == "reserve" and -(-(size or 0) // self.block) > self.charged(self.pool.state.names[name])

    @precondition(lambda self: self.has_volume() and self.has_room())
    @rule(index=which)
    def snapshot(self, index: int) -> None:
        name, new = self.volume_name(index), self.fresh_name()
        self.pool.snapshot(name, new)
        image = self.oracle.images[name]
        self.oracle.images[new] = replace(image.copy(), snapshot=True)
        image.age = Age(image.age)

    @precondition(lambda self: self.has_snapshot() and self.has_room())
    @rule(index=which, more=st.sampled_from([0, 0, 512, 5000 * 512]))
    def clone(self, index: int, more: int) -> None:
        name, new = self.snapshot_name(index), self.fresh_name()
        image = self.oracle.images[name]
        self.pool.clone(name, new, size=image.size + more if more else None)
        self.oracle.images[new] = replace(image.copy(), snapshot=False, size=image.size + more, age=Age(image.age))

    @precondition(lambda self: self.has_volume() and self.has_snapshot())
    @rule(volume=which, snapshot=which)
    def rollback(self, volume: int, snapshot: int) -> None:
        name, source = self.volume_name(volume), self.snapshot_name(snapshot)
        self.pool.rollback(name, source)
        image = self.oracle.images[source]
        self.oracle.images[name] = replace(image.copy(), snapshot=False, age=Age(image.age))

    @precondition(lambda self: len(self.oracle.images) > 1)
    @rule(index=which, kind=st.sampled_from(["snapshot", "snapshot", "any"]))
    def remove(self, index: int, kind: str) -> None:
        name = self.snapshot_name(index) if kind == "snapshot" and self.has_snapshot() else self.any_name(index)
        self.pool.remove(name)
        del self.oracle.images[name]

    @precondition(has_visible)
    @rule(index=which, again=st.booleans())
    def defer(self, index: int, again: bool) -> None:
        """Remove what somebody uses, and give its name to something else."""
        name = self.visible_name(index)
        hidden = f"{name}~{self.pool.state.names[name].layer}"
        opened = self.pool.volume(name)
        again = again and self.has_room()
        self.pool.execute([Remove(name, deferred=True), *([Create(name, 3 * self.block)] if again else [])])
        assert (opened.name, self.pool.opened(hidden)) == (hidden, opened)
        self.oracle.rename(name, hidden)
        if self.reader is not None and self.reader.name == name:
            self.reader.name = hidden
        if again:
            self.oracle.images[name] = Image(3 * self.block, {}, Age(None))
        for command in (Snapshot(hidden, "x"), Rename(hidden, "x"), Resize(hidden, 512)):
            with pytest.raises(Invalid):
                self.pool.execute([command])

    @precondition(has_deferred)
    @rule(index=which)
    def free(self, index: int) -> None:
        """Nobody uses it any more."""
        names = [name for name in sorted(self.oracle.images) if is_deferred(name)]
        name = names[index % len(names)]
        self.pool.remove(name)
        del self.oracle.images[name]

    @precondition(has_visible)
    @rule(index=which)
    def rename(self, index: int) -> None:
        name, new = self.visible_name(index), self.fresh_name()
        self.pool.rename(name, new)
        self.oracle.rename(name, new)
        if self.reader is not None and self.reader.name == name:
            self.reader.name = new

    @precondition(has_volume)
    @rule(index=which, size=sizes | st.just(LARGE))
    def resize(self, index: int, size: Measure) -> None:
        name = self.volume_name(index)
        if self.attempt(lambda: self.pool.resize(name, self.bytes_of(size))):
            self.oracle.resize(name, self.bytes_of(size))

    # -- time

    @rule(
        what=st.sampled_from(["commit"] * 5 + ["reopen", "crash", "kill", "kill", "merge_all", "exclusive"]),
        index=which,
    )
    def time(self, what: str, index: int) -> None:
        match what:
            case "commit":
                self.commit()
            case "reopen":
                self.reopen()
            case "crash":
                self.crash()
            case "kill":
                self.kill()
            case "merge_all":
                self.merge_all()
            case "exclusive" if self.oracle.images and not self.pool.state.mergeable:
                self.exclusive(index)

    def commit(self) -> None:
        self.pool.commit()
        self.durable = {name: image.copy() for name, image in self.oracle.images.items()}
        self.oracle.seen = {}
        if self.reader is None:
            assert self.pool.allocator.pending == 0

    def reopen(self) -> None:
        self.reader = None
        self.pool.close()
        self.open()
        self.durable = {name: image.copy() for name, image in self.oracle.images.items()}
        self.oracle.seen = {}

    def open(self) -> None:
        """As a daemon does: what is answered survives the end of the process."""
        self.pool = Pool.open(self.path, autocommit=False, policy=FIXED)
        self.pool.unsynced.start(self.pool.journal.sequence + 1)

    def kill(self) -> None:
        """The process ends and the machine goes on: everything that was answered is there."""
        self.reader = None
        self.pool.unsynced.publish()
        kill(self.pool)
        self.open()
        self.durable = {name: image.copy() for name, image in self.oracle.images.items()}
        self.oracle.seen = {}

    def crash(self) -> None:
        """What was committed is there; bytes written since then may be, where their subblocks were there before."""
        self.reader = None
        self.pool.fail(OSError(5, "crashed"))
        self.pool.close()
        self.open()
        later, self.oracle.seen = self.oracle.seen, {}
        self.oracle.images = {name: image.copy() for name, image in self.durable.items()}
        for name, image in self.oracle.images.items():
            if not image.snapshot:
                self.settle(name, image, later.get(name, {}))
        self.durable = {name: image.copy() for name, image in self.oracle.images.items()}

    def settle(self, name: str, image: Image, later: dict[int, set[bytes]]) -> None:
        """Let the oracle take over what a crash made of subblocks that were being overwritten."""
        volume, sub = self.pool.volume(name), self.oracle.sub
        for number in later.keys() & image.held.keys():
            length = min(sub, image.size - number * sub)
            found = volume.read(number * sub, length)
            values = [image.held[number], *later[number]]
            assert all(byte in {value[at] for value in values} for at, byte in enumerate(found))
            image.held[number] = found.ljust(sub, b"\0")

    @precondition(lambda self: self.reader is None and self.has_snapshot())
    @rule(index=which)
    def begin_read(self, index: int) -> None:
        name = self.snapshot_name(index)
        volume = self.pool.volume(name)
        length = min(volume.size, 8 * self.block)
        segments = volume.segments(0, length)
        self.reader = Reader(self.pool.enter(), name, volume, segments, self.oracle.read(name, 0, length))

    @precondition(lambda self: self.reader is not None)
    @rule()
    def end_read(self) -> None:
        """A snapshot's bytes are where they were, whatever was merged, freed and written meanwhile."""
        reader, self.reader = self.reader, None
        assert reader is not None
        if reader.name in self.oracle.images:
            result = bytearray(len(reader.expected))
            reader.volume.read_segments(reader.segments, memoryview(result))
            assert result == reader.expected
        self.pool.leave(reader.epoch)

    # -- merging

    def merge_all(self) -> None:
        self.commit()
        self.pool.merge_all()
        self.commit()
        assert not self.pool.state.mergeable

    def settled(self, numbers: Iterable[int]) -> list[Layer]:
        layers = [self.pool.state.layers[number] for number in numbers]
        return [layer for layer in layers if self.pool.is_settled(layer)]

    @precondition(lambda self: bool(self.settled(self.pool.state.mergeable)))
    @rule(first=which, work=works | st.just([]), commit=st.booleans())
    def merge_step(self, first: int, work: list[tuple[str, Measure, Measure]], commit: bool) -> None:
        """One leaf of one layer, while its child is written wherever the step does not forbid it."""
        parents = self.settled(self.pool.state.mergeable)
        parent = parents[first % len(parents)]
        step = next(merge.steps(self.pool, parent), None)
        if step is None:
            return
        step.copy()
        held = set(step.blocks)
        for kind, place, measure in work:
            name = step.layer.name
            if step.layer.head and name is not None:
                offset, length = self.clip(name, place, self.bytes_of(measure))
                if not held & set(range(offset // self.block, (offset + length) // self.block + 1)):
                    self.change(name, kind, offset, length)
        if commit:
            self.commit()
        step.finish()

    @precondition(lambda self: bool(self.settled(self.pool.state.prunable)))
    @rule(place=places, measure=lengths)
    def prune(self, place: Measure, measure: Measure) -> None:
        """A layer with several children gives up what none of them shows, while they are written."""
        layer = self.settled(self.pool.state.prunable)[0]
        for turn, _ in enumerate(merge.prune(self.pool, layer)):
            heads = [child.name for child in layer.children.values() if child.head and child.name is not None]
            if heads:
                name = heads[turn % len(heads)]
                self.change(name, "write", *self.clip(name, place, self.bytes_of(measure)))

    # -- queries

    @precondition(lambda self: bool(self.oracle.images))
    @rule(index=which, place=places, measure=lengths | st.just((9, 0, 0)))
    def read(self, index: int, place: Measure, measure: Measure) -> None:
        name = self.any_name(index)
        offset, length = self.clip(name, place, self.bytes_of(measure))
        assert self.pool.volume(name).read(offset, length) == self.oracle.read(name, offset, length)

    @precondition(lambda self: bool(self.oracle.images))
    @rule(
        index=which,
        place=places,
        measure=lengths | st.just((2 * LEAF_BLOCKS, 0, 0)),
        most=st.integers(1, 5) | st.just(999),
    )
    def status(self, index: int, place: Measure, measure: Measure, most: int) -> None:
        name = self.any_name(index)
        offset, length = self.clip(name, place, max(self.bytes_of(measure), 1))
        layer, sub = self.pool.volume(name).layer, self.oracle.sub
        for context, expected in (("base:allocation", self.allocation), ("qemu:allocation-depth", depth)):
            result = extents.status(layer, context, offset, length, sub, most).tolist()
            assert 1 <= len(result) <= most
            assert all(size > 0 for size, _ in result)
            assert all(one[1] != two[1] for one, two in pairwise(result))
            covered = sum(size for size, _ in result)
            assert covered == length or (covered < length and len(result) == most)
            position = offset
            for size, flags in result:
                for number in range(position // sub, -(-(position + size) // sub)):
                    assert flags == expected(name if context[0] == "b" else layer, number)  # type: ignore[arg-type]
                position += size
                assert position == offset + length or position % sub == 0

    def allocation(self, name: str, number: int) -> int:
        if number in self.oracle.images[name].held:
            return 0
        present = self.pool.volume(name).layer.entry(number // SUBBLOCKS) >> 32
        return extents.ZERO if present else extents.ZERO | extents.HOLE

    @precondition(has_snapshot)
    @rule(first=which, second=which)
    def diff(self, first: int, second: int) -> None:
        """It holds every byte that differs, and nothing that was left alone on both ways to the common ancestor."""
        one, two = self.snapshot_name(first), self.snapshot_name(second)
        before, after = self.oracle.images[one], self.oracle.images[two]
        sub = self.oracle.sub
        smaller, larger = sorted((before.size, after.size))
        differing = {
            number
            for number in before.held.keys() | after.held.keys()
            if before.held.get(number) != after.held.get(number)
        }
        touched = touched_between(before.age, after.age)
        result = self.pool.diff(one, two)
        ends = [(extent.offset, extent.offset + extent.length) for extent in result]
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
        assert not ends or ends[-1][1] <= larger
        said: set[int] = set()
        for extent in result:
            numbers = range(extent.offset // sub, -(-(extent.offset + extent.length) // sub))
            said.update(numbers)
            for number in numbers:
                start = max(extent.offset, number * sub)
                stop = min(extent.offset + extent.length, (number + 1) * sub)
                if start < smaller:
                    assert number in touched or (stop > smaller and number == smaller // sub)
                if not extent.data and start < after.size:
                    assert not any(self.oracle.read(two, start, min(stop, after.size) - start))
                if extent.data:
                    assert number in after.held
        assert differing <= said
        assert (
            sum(min(stop, larger) - max(start, smaller) for start, stop in ends if stop > smaller) == larger - smaller
        )

    def exclusive(self, index: int) -> None:
        """What `exclusive` promises is what a copy of the pool gives back."""
        self.reopen()  # as the copy will be: at load, every layer without a name is pruned anew
        self.merge_all()
        name = self.any_name(index)
        promised = self.pool.show(name).exclusive
        copy = self.directory / "copy"
        shutil.copytree(self.path, copy)
        try:
            with Pool.open(copy) as twin:
                used = twin.info().data_used
                twin.remove(name)
                assert promised == used - twin.info().data_used
        finally:
            shutil.rmtree(copy)

    # -- after every step

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "pool"):
            assert check(self.pool) == []

    @invariant()
    def reads_as_the_oracle_says(self) -> None:
        if not hasattr(self, "pool"):
            return
        rows = {row.name: row for deferred in (False, True) for row in self.pool.list(deferred=deferred)}
        assert [row.name for row in self.pool.list(deferred=True)] == sorted(filter(is_deferred, self.oracle.images))
        assert rows.keys() == self.oracle.images.keys()
        for name, image in self.oracle.images.items():
            row, volume = rows[name], self.pool.volume(name)
            assert (row.size, row.kind == "snapshot") == (image.size, image.snapshot)
            self.compare(name, image, volume)
            assert row.referenced == referenced(volume.layer) * self.block
            assert row.shared == max(row.referenced - row.exclusive, 0)

    def compare(self, name: str, image: Image, volume: Volume) -> None:
        """The small volumes whole, of the large ones what the rules can reach."""
        near = 15 * self.block
        for start in (0, (LEAF_BLOCKS - 2) * self.block, (2 * LEAF_BLOCKS - 2) * self.block):
            length = min(near, image.size - start)
            if length > 0:
                assert volume.read(start, length) == self.oracle.read(name, start, length)
        held = {number for block in mapped(volume.layer) for number in self.data_of(volume.layer, block)}
        assert held == image.held.keys()

    def data_of(self, layer: Layer, block: int) -> Iterator[int]:
        for sub, physical in enumerate(walk(layer, block)):
            if physical:
                yield block * SUBBLOCKS + sub


def mapped(layer: Layer) -> list[int]:
    """The blocks that some layer of the chain has an entry for."""
    return sorted(
        {
            (leaf << LEAF_SHIFT) + index
            for node in chain(layer)
            for leaf, own in node.own.items()
            for index, entry in enumerate(own)
            if entry
        }
    )


def referenced(layer: Layer) -> int:
    """By the definition: distinct blocks that reads lead to, and those it owns without data."""
    physical = {own >> 32 for leaf in layer.own.values() for own in leaf}
    for block in mapped(layer):
        physical.update(walk(layer, block))
    return len(physical - {0})


def depth(layer: Layer, number: int) -> int:
    """How many layers down a subblock's bytes, or its zeroes, are; 0: nowhere."""
    block, sub = divmod(number, SUBBLOCKS)
    for count, node in enumerate(chain(layer), start=1):
        entry = node.own[block >> LEAF_SHIFT][block & LEAF_MASK] if block >> LEAF_SHIFT in node.own else 0
        if (entry | entry >> 16) >> sub & 1:
            return count
    return 0


def touched_between(one: Age, two: Age) -> set[int]:
    """Subblocks touched on either way to the latest common past."""
    ages: list[list[Age]] = []
    for age in (one, two):
        line: list[Age] = []
        node: Age | None = age
        while node is not None:
            line.append(node)
            node = node.before
        ages.append(line)
    common = {id(age) for age in ages[0]} & {id(age) for age in ages[1]}
    return {number for line in ages for age in line if id(age) not in common for number in age.touched}


TestModel = Machine.TestCase
TestModel.settings = settings(
    max_examples=int(os.environ.get("NBDTHIN_EXAMPLES", "3000")) if LONG else 50,
    stateful_step_count=80 if LONG else 50,
    derandomize=not LONG,
    phases=list(Phase) if LONG else [Phase.generate],  # a red run in CI ends within the minute, and prints its blob
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def test_a_clone_may_not_be_smaller_than_its_snapshot() -> None:
    """The one refusal of structure that the machine does not come upon."""
    with tempfile.TemporaryDirectory() as directory:
        Pool.init(Path(directory) / "pool", size=1 << 20, block_size=16 * KiB)
        with Pool.open(Path(directory) / "pool") as pool:
            pool.create("a", 4096)
            pool.snapshot("a", "s")
            try:
                pool.clone("s", "c", size=512)
            except Invalid:
                return
    raise AssertionError("a smaller clone was made")

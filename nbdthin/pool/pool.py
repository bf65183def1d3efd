"""The pool: names, layers, space and the order in which all of it becomes durable.

Everything here is synchronous and belongs to one thread, but for `Batch.sync`, `Batch.write_checkpoint` and
`Pool.punch`, which do I/O and touch nothing else. A commit is

    batch = pool.begin()        packs the records of this moment; changes from here on belong to the next batch
    batch.sync()                data first, then the journal's frame
    pool.finish(batch)          what the batch freed may now be used again

and `Pool.commit` is the three in a row. `live.LivePool` runs the middle step in a thread. After a sync that failed,
`fail` makes the pool read-only for good: what the disk holds is unknown, and a second try could report success for
data that the kernel has already dropped.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
import uuid
import weakref
from array import array
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from nbdthin.errors import Corrupt, Exists, Invalid, Locked, NoSpace, NotFound, PoolFailed
from nbdthin.pool import commands, extents, merge, space
from nbdthin.pool.allocator import Allocator
from nbdthin.pool.commands import Command
from nbdthin.pool.data import DataFile, device_size, is_device
from nbdthin.pool.files import FILES, Files, write_all
from nbdthin.pool.journal import Frame, Journal
from nbdthin.pool.layers import Layer, State, Words, words
from nbdthin.pool.records import (
    LEAF_BYTES,
    BadRecord,
    Counter,
    End,
    Leaf,
    Name,
    Record,
    Unname,
    decode,
    encode,
)
from nbdthin.pool.rows import Extent, PoolInfo, Row
from nbdthin.pool.superblock import DATA_HEADER, Superblock, read_superblock
from nbdthin.pool.volume import Shrink, Volume
from nbdthin.units import GiB, KiB, MiB, format_size, parse_size

DEFAULT_SIZE = 100 * GiB  # what docker's loop pool had; sparse, so it costs nothing
DEFAULT_BLOCK_SIZE = 64 * KiB
BLOCK_SIZES = (16 * KiB, 1 * MiB)
MIN_BLOCKS = 16
MAX_BLOCKS = 0xFFFFFFFF  # one number is the mark of a mixed entry
_LOOK = 128 * KiB  # bytes at the start and the end of a device that tell whether it is in use
RUN_BYTES = 1 * MiB  # what a volume is given at a time, so that it stays contiguous beside others
PUNCH_BYTES = 256 * KiB  # at a time: ext4 keeps every write to the file waiting while it punches, 3.7 s for 676 MB
CHECKPOINT_JOURNAL = 8 * MiB  # journal that may grow before a checkpoint is worth its writing
_CHECKPOINT_FRAME = 1 * MiB

assert sys.byteorder == "little", "leaves are stored as this machine's u64: little-endian only (FORMAT.md)"


class Batch:
    """What one commit makes durable."""

    def __init__(
        self, pool: Pool, payload: bytes | None, sync_data: bool, freed: list[Words], capture: Capture | None
    ) -> None:
        self._pool = pool
        self._payload = payload
        self._sync_data = sync_data
        self.freed = freed
        self._capture = capture  # the state after this batch, when a checkpoint is due
        self._number = 0

    @property
    def checkpoint_due(self) -> bool:
        return self._capture is not None

    def sync(self) -> None:
        """Data, then the frame that points to it. OSError is final: `Pool.fail`."""
        if self._sync_data:
            self._pool.data.sync()
        if self._payload is not None:
            self._pool.journal.append(self._payload)
        if self._capture is not None:
            self._number = self._pool.journal.start_segment()

    def write_checkpoint(self) -> None:
        """After `sync`; may run beside later batches. An OSError costs nothing: the journal stays longer."""
        assert self._capture is not None
        journal = self._pool.journal
        journal.prepare_next()  # first: it matters more than a short journal when space is short
        journal.write_checkpoint(self._number, self._capture.payloads())
        journal.finish_checkpoint(self._number)


class Capture:
    """The state at one moment: leaves of heads are copied, those of sealed layers, which never change, are shared."""

    def __init__(self, state: State) -> None:
        self._records = state.snapshot_records()
        self._leaves = [
            (layer.number, leaf, own[:] if layer.head else own)
            for layer in state.layers.values()
            for leaf, own in layer.own.items()
        ]

    def payloads(self) -> Iterator[bytes]:
        """The state as a checkpoint's frames."""
        part: list[Record] = []
        size = 0
        for record in self._all():
            part.append(record)
            size += LEAF_BYTES if isinstance(record, Leaf) else 64
            if size >= _CHECKPOINT_FRAME:
                yield encode(part)
                part, size = [], 0
        if part:
            yield encode(part)

    def _all(self) -> Iterator[Record]:
        yield from self._records
        leaves = 0
        for number, leaf, entries in self._leaves:
            if words(entries).any():
                leaves += 1
                yield Leaf(number, leaf, entries.tobytes())
        yield End(len(self._records) + leaves)


class Pool:
    """An open pool. `Pool.init` makes one, `Pool.open` opens it under its lock.

    Used without a daemon, each verb is durable when it returns; `with pool.batch():` makes several one commit.
    """

    def __init__(self, path: Path, superblock: Superblock, lock: int, autocommit: bool, files: Files) -> None:
        self.path = path
        self.superblock = superblock
        self.block_size = superblock.block_size
        self.failed: str | None = None  # why nothing can be made durable any more
        self.state = State()
        self.allocator = Allocator(superblock.size // self.block_size, max(RUN_BYTES // self.block_size, 1))
        self.journal = Journal(path / "journal", files)
        self.data = DataFile(path / superblock.data, superblock.size, files)
        self._lock = lock
        self._autocommit = autocommit
        self._records: list[Record] = []  # structural changes since the last `begin`
        self._changed: dict[int, Layer] = {}  # layers with dirty entries
        self._freed_blocks: list[int] = []  # since the last `begin`
        self._freed_arrays: list[Words] = []
        self._volumes: weakref.WeakValueDictionary[str, Volume] = weakref.WeakValueDictionary()
        self._batch: list[Command] | None = None
        self._settling: set[int] = set()  # layers that the batch being made durable leaves without a name or a child
        self._checkpointing = False
        self._checkpoint_at = CHECKPOINT_JOURNAL  # bytes of journal
        self._epoch = 0  # counts finished batches that freed something
        self._readers: dict[int, int] = {}  # epoch -> reads under way that began in it
        self._limbo: deque[tuple[int, Words]] = deque()  # freed and durable, perhaps still being read

    # -- making and opening

    @staticmethod
    def init(
        path: Path | str,
        *,
        size: int | str | None = None,
        block_size: int | str = DEFAULT_BLOCK_SIZE,
        data: Path | str | None = None,
        force: bool = False,
        files: Files = FILES,
    ) -> None:
        """Make a pool at `path`, a directory that does not exist or is empty.

        `size` (bytes or text) is a limit, not an allocation; a block device gives its own. `data` names a file or a
        block device to use instead of POOL/data; one that holds something is refused without `force`.
        Raises Invalid, Exists, NoSpace or OSError, and leaves nothing behind. A power cut leaves the pool or none, and
        perhaps a directory `.NAME-XXXXXXXX` beside it, which may be removed. `files` is as for `open`.
        """
        path = Path(path)
        if path.is_symlink():
            path = path.resolve()
        block_size = parse_size(block_size)
        if block_size & (block_size - 1) or not BLOCK_SIZES[0] <= block_size <= BLOCK_SIZES[1]:
            raise Invalid(f"not a block size: {format_size(block_size)} (a power of two, 16 KiB to 1 MiB)")
        if (path / "superblock").exists():
            raise Exists(f"{path} is a pool already")
        inside = next((parent for parent in path.absolute().parents if (parent / "superblock").exists()), None)
        if inside is not None:
            raise Invalid(f"{path} is inside the pool {inside}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise Exists(f"{path} exists and is not empty: choose another place, or remove it")
        data_path = Path(data).absolute() if data is not None else None
        total = _data_size(data_path, size, block_size)
        superblock = Superblock(
            uuid=str(uuid.uuid4()),
            block_size=block_size,
            size=total,
            data="data" if data_path is None else str(data_path),
            created=time.time(),
        )
        missing = [parent for parent in path.absolute().parents if not parent.exists()]
        draft = path.parent / f".{path.name}-{superblock.uuid[:8]}"  # renamed when it is complete
        drafted = None
        try:
            for parent in reversed(missing):
                files.mkdir(parent, 0o777)
            files.mkdir(draft)
            drafted = _DataDraft(data_path if data_path is not None else draft / "data", superblock, force, files)
            Journal.create(draft / "journal", encode([Counter(1), End(1)]), files)
            files.close(files.open(draft / "lock", os.O_CREAT))
            superblock.write(draft / "superblock", files)
            files.sync_directory(draft)
            drafted.write_header()
            files.rename(draft, path)
            draft = path
            for parent in (path, *missing):
                files.sync_directory(parent.absolute().parent)
            drafted.close()
        except BaseException as error:
            if drafted is not None:
                drafted.undo()
            shutil.rmtree(draft, ignore_errors=True)
            for parent in missing:
                with contextlib.suppress(FileNotFoundError):
                    parent.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space for a pool at {path}") from error
            raise

    @classmethod
    def open(cls, path: Path | str, *, autocommit: bool = True, inspect: bool = False, files: Files = FILES) -> Self:
        """Open the pool at `path`: lock it, replay its journal, work out its free space.

        `autocommit` False leaves it to the caller to commit; `inspect` opens it to be looked at: nothing is written.
        `files` is what writes; the real thing, or a wrapper of it that notes what it does.

        Raises NotFound, Locked, Corrupt, Invalid (its data was truncated) or OSError.
        """
        path = Path(path)
        superblock = read_superblock(path / "superblock")
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise Locked(f"the pool at {path} is open in another process (use its daemon, or stop it)") from error
        try:
            pool = cls(path, superblock, lock, autocommit, files)
        except BaseException:
            os.close(lock)
            raise
        try:
            pool._load(inspect)
        except BaseException:
            pool._release()
            raise
        return pool

    def _load(self, inspect: bool) -> None:
        header = os.pread(self.data.fd, DATA_HEADER, 0)
        if header != self.superblock.data_header():
            raise Corrupt(self.data.path, 0, "this is not the data of this pool, or its header is damaged")
        self._checkpoint_end: tuple[Path, Record | None, int] = (self.path, None, 0)
        self.journal.load(self._replay, repair_tail=not inspect)
        path, last, count = self._checkpoint_end
        if last != End(count - 1):
            raise Corrupt(path, None, "the checkpoint is not whole")
        self.state.find_unnamed()
        if inspect:
            self.failed = "it was opened to be looked at"
        self.claim_blocks()

    def _replay(self, frame: Frame) -> None:
        try:
            records = decode(frame.payload)
            for record in records:
                self.state.apply(record)
        except BadRecord as error:
            raise Corrupt(frame.path, frame.offset, str(error)) from error
        if frame.path.suffix == ".checkpoint" and records:
            self._checkpoint_end = (frame.path, records[-1], self._checkpoint_end[2] + len(records))

    def claim_blocks(self) -> None:
        """Rebuild free space from the entries. Raises Corrupt when they do not add up."""
        for layer in self.state.layers.values():
            blocks = layer.physical_blocks()
            layer.blocks = len(blocks)
            bad = self.allocator.claim(blocks)
            if len(bad):
                what = "lies outside the pool" if bad[0] >= self.allocator.total else "has two owners"
                raise Corrupt(self.path / "journal", None, f"block {bad[0]} of layer {layer.number} {what}")

    def close(self) -> None:
        """Commit what is not yet durable, and let go of the pool."""
        try:
            if self.failed is None:
                self.commit()
        finally:
            self._release()

    def _release(self) -> None:
        self.journal.close()
        self.data.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- verbs

    def create(self, name: str, size: int | str, *, labels: Mapping[str, str] | None = None) -> None:
        """A new volume of `size` that reads as zeroes. Raises Invalid or Exists."""
        self._do(commands.Create(name, parse_size(size), labels or {}))

    def snapshot(self, volume: str, name: str, *, labels: Mapping[str, str] | None = None) -> None:
        """Keep what `volume` holds now as snapshot `name`. Raises NotFound, Invalid or Exists."""
        self._do(commands.Snapshot(volume, name, labels or {}))

    def clone(
        self,
        snapshot: str,
        name: str,
        *,
        size: int | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """A new volume that starts as `snapshot`, of its size or larger. Raises NotFound, Invalid or Exists."""
        self._do(commands.Clone(snapshot, name, None if size is None else parse_size(size), labels or {}))

    def rollback(self, volume: str, snapshot: str) -> None:
        """Make `volume` what `snapshot` is; what it held is gone. Raises NotFound or Invalid."""
        self._do(commands.Rollback(volume, snapshot))

    def rename(self, old: str, new: str) -> None:
        """Raises NotFound, Invalid or Exists."""
        self._do(commands.Rename(old, new))

    def remove(self, *names: str) -> None:
        """Remove volumes and snapshots, all or none; clones of a snapshot stay what they are. Raises NotFound."""
        self._do(*(commands.Remove(name) for name in names))

    def resize(self, name: str, size: int | str) -> None:
        """Raises NotFound or Invalid. What lies behind a smaller end is gone."""
        self._do(commands.Resize(name, parse_size(size)))

    def label(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Set labels, remove those whose value is None. Raises NotFound or Invalid."""
        self._do(commands.Label(name, changes))

    @contextlib.contextmanager
    def batch(self) -> Iterator[Self]:
        """Collect the verbs called inside: all or nothing, one commit when the block ends."""
        if self._batch is not None:
            raise Invalid("a batch is open already")
        self._batch = []
        try:
            yield self
            collected = self._batch
        finally:
            self._batch = None
        self._do(*collected)

    def _do(self, *wanted: Command) -> None:
        if self._batch is not None:
            self._batch.extend(wanted)
            return
        self.execute(wanted)
        if self._autocommit:
            self.commit()
            with contextlib.suppress(OSError, NoSpace):  # nothing waits for a merge: it is tried again at the next
                self.merge_all()

    def execute(self, wanted: Sequence[Command]) -> None:
        """Make `wanted` so, all or nothing. Durable with the next commit."""
        self.check_writable()
        draft = commands.plan(wanted, self.state.names, self.state.next_layer, time.time())
        ends: builtins.list[Shrink] = []
        try:
            for name, size in draft.shrinks:
                ends.append(self.volume(name).prepare_end(size))
        except BaseException:
            for end in ends:
                end.abandon()
            raise
        self.apply(draft.records)
        for end in ends:
            end.finish()

    def apply(self, records: Iterable[Record]) -> None:
        """The live side of `State.apply`: frees what is gone, tells open volumes, notes it for the journal."""
        for record in records:
            before = self.state.names.get(record.name) if isinstance(record, Name | Unname) else None
            for layer in self.state.apply(record):
                self.discard_blocks(layer.physical_blocks())
                self.allocator.drop_run(layer.number)
                self._changed.pop(layer.number, None)
            if before is not None:
                self.allocator.drop_run(before.layer)
            if isinstance(record, Name):
                volume = self._volumes.get(record.name)
                if volume is not None:
                    volume.layer = self.state.layers[record.layer]
                    volume.size = record.size
            elif isinstance(record, Unname):
                self._follow(record.name, before)
            self._records.append(record)

    def _follow(self, name: str, before: Name | None) -> None:
        """`name` is gone: an open volume of it goes by the new name of its layer, or is cut off."""
        volume = self._volumes.pop(name, None)
        if volume is None or before is None:
            return
        layer = self.state.layers.get(before.layer)
        if layer is None or layer.name is None:
            volume.detach()
        else:
            volume.name = layer.name
            self._volumes[layer.name] = volume

    def volume(self, name: str) -> Volume:
        """The volume or snapshot `name`, for I/O; one object for all who ask. Raises NotFound."""
        volume = self._volumes.get(name)
        if volume is None:
            row = self.state.names.get(name)
            if row is None:
                raise NotFound(f"no volume or snapshot {name!r} (`nbdthin ls` lists what there is)")
            volume = Volume(self, name, self.state.layers[row.layer], row.size, row.snapshot)
            self._volumes[name] = volume
        return volume

    # -- what volumes and merges do to the mapping

    def put(self, layer: Layer, block: int, entry: int) -> None:
        assert self.state.layers.get(layer.number) is layer
        layer.put(block, entry)
        self._changed[layer.number] = layer

    def put_leaf(self, layer: Layer, leaf: int, entries: array[int] | None) -> None:
        assert self.state.layers.get(layer.number) is layer
        layer.put_leaf(leaf, entries)
        self._changed[layer.number] = layer

    def discard_block(self, physical: int) -> None:
        """An entry gave `physical` up: free once that is durable and nobody reads it."""
        self.allocator.discard(physical)
        self._freed_blocks.append(physical)

    def discard_blocks(self, physical: Words) -> None:
        if len(physical):
            self.allocator.discard_many(physical)
            self._freed_arrays.append(physical)

    def give_back(self, physical: list[int]) -> None:
        """Blocks that no entry ever pointed to: free at once."""
        if physical:
            blocks = np.array(physical, dtype=np.uint64)
            self.allocator.discard_many(blocks)
            self.allocator.release(blocks)

    def check_writable(self) -> None:
        if self.failed is not None:
            raise PoolFailed(f"the pool is read-only: {self.failed}")

    # -- commit

    @property
    def has_changes(self) -> bool:
        """Something is not durable yet."""
        return bool(self._records or self._changed or self.data.dirty)

    def begin(self) -> Batch:
        """Pack what has changed. Raises PoolFailed."""
        self.check_writable()
        records = self._records
        self._records = []
        for layer in self._changed.values():
            records.extend(layer.take_dirty())
        self._changed = {}
        freed = self._freed_arrays
        if self._freed_blocks:
            freed.append(np.array(self._freed_blocks, dtype=np.uint64))
        self._freed_blocks, self._freed_arrays = [], []
        self._settling, self.state.unsettled = self.state.unsettled, set()
        sync_data, self.data.dirty = self.data.dirty, False
        journal = self.journal
        payload = encode(records) if records else None
        grown = journal.bytes_since_checkpoint + (len(payload) if payload is not None else 0)
        due = not self._checkpointing and grown > max(self._checkpoint_at, journal.checkpoint_bytes)
        self._checkpointing |= due
        return Batch(self, payload, sync_data, freed, Capture(self.state) if due else None)

    def finish(self, batch: Batch) -> None:
        """`batch` is durable."""
        self._settling = set()
        if batch.freed:
            self._limbo.append((self._epoch, np.concatenate(batch.freed)))
            self._epoch += 1

    def checkpoint_ended(self, error: OSError | None) -> None:
        """The checkpoint of a batch was written, or not: then the next try is some way off."""
        self._checkpointing = False
        grown = self.journal.bytes_since_checkpoint if error is not None else 0
        self._checkpoint_at = grown + CHECKPOINT_JOURNAL

    def fail(self, error: OSError) -> None:
        """A sync failed: from now on the pool is read-only."""
        if self.failed is None:
            self.failed = f"a sync failed ({os.strerror(error.errno or errno.EIO)}); check the disk, then restart"

    def commit(self) -> None:
        """Make everything so far durable, in this thread. Raises PoolFailed."""
        self.check_writable()
        if self._records or self._changed or self.data.dirty:
            batch = self.begin()
            try:
                batch.sync()
            except OSError as error:
                self.fail(error)
                raise PoolFailed(f"the pool is read-only: {self.failed}") from error
            self.finish(batch)
            if batch.checkpoint_due:
                try:
                    batch.write_checkpoint()
                except OSError as error:
                    self.checkpoint_ended(error)
                else:
                    self.checkpoint_ended(None)
        while (blocks := self.take_reclaimable()) is not None:
            self.punch(blocks)
            self.allocator.release(blocks)

    # -- freed space

    def enter(self) -> int:
        """A read that will not end within this turn begins; returns what `leave` takes."""
        self._readers[self._epoch] = self._readers.get(self._epoch, 0) + 1
        return self._epoch

    def leave(self, epoch: int) -> None:
        left = self._readers[epoch] - 1
        if left:
            self._readers[epoch] = left
        else:
            del self._readers[epoch]

    @property
    def has_freed(self) -> bool:
        """Blocks are freed, and durably so, but not yet for use."""
        return bool(self._limbo)

    @property
    def can_reclaim(self) -> bool:
        """`take_reclaimable` would find something."""
        return bool(self._limbo) and not (self._readers and min(self._readers) <= self._limbo[0][0])

    def take_reclaimable(self) -> Words | None:
        """Freed blocks that are durable so and that no read can still be using: to `punch`, then to release."""
        return self._limbo.popleft()[1] if self.can_reclaim else None

    def punch(self, blocks: Words) -> None:
        """Give the space of `blocks` back to the file system. An error there loses space, not data."""
        ordered = np.sort(blocks)
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        for run in np.split(ordered, breaks):
            start, end = int(run[0]) * self.block_size, (int(run[-1]) + 1) * self.block_size
            for position in range(start, end, PUNCH_BYTES):
                with contextlib.suppress(OSError):
                    self.data.punch(position, min(PUNCH_BYTES, end - position))

    # -- merging of layers that lost their name

    def merge_all(self) -> None:
        """Merge or prune every layer without a name, in this thread."""
        while (layer := self.next_unnamed()) is not None:
            if layer.number in self.state.prunable:
                for _step in merge.prune(self, layer):
                    pass
            for step in merge.steps(self, layer):
                step.copy()
                step.finish()
            self.commit()

    def next_unnamed(self, skip: Container[int] = ()) -> Layer | None:
        """A layer without a name that can be pruned or merged now."""
        for number in (*self.state.prunable, *self.state.mergeable):
            layer = self.state.layers[number]
            if number not in skip and self.is_settled(layer):
                return layer
        return None

    def is_settled(self, layer: Layer) -> bool:
        """The batch that took the layer's name, or a child, is durable.

        Before, a crash would bring them back, when a volume's head that has taken over the layer's blocks may already
        have overwritten them in place.
        """
        return layer.number not in self.state.unsettled and layer.number not in self._settling

    # -- queries

    def list(self) -> builtins.list[Row]:
        """Every volume and snapshot, by name."""
        return [self._row(self.state.names[name]) for name in sorted(self.state.names)]

    def show(self, name: str) -> Row:
        """Raises NotFound."""
        row = self.state.names.get(name)
        if row is None:
            raise NotFound(f"no volume or snapshot {name!r} (`nbdthin ls` lists what there is)")
        return self._row(row)

    def _row(self, row: Name) -> Row:
        layer = self.state.layers[row.layer]
        referenced = space.referenced(layer) * self.block_size
        exclusive = space.exclusive(layer) * self.block_size
        return Row(
            name=row.name,
            kind="snapshot" if row.snapshot else "volume",
            size=row.size,
            referenced=referenced,
            exclusive=exclusive,
            shared=max(referenced - exclusive, 0),
            parent=space.named_parent(layer),
            created=row.created,
            labels=dict(row.labels),
        )

    def diff(self, before: str, after: str) -> builtins.list[Extent]:
        """Where snapshot `after` may differ from `before`: what was written between them and their common ancestor.

        Costs what changed, not the size. Raises NotFound, or Invalid for a volume.
        """
        rows = []
        for name in (before, after):
            row = self.state.names.get(name)
            if row is None:
                raise NotFound(f"no snapshot {name!r} (`nbdthin ls` lists what there is)")
            if not row.snapshot:
                raise Invalid(f"{name!r} is a volume, which changes: take a snapshot of it first")
            rows.append(row)
        first, second = rows
        layers = self.state.layers
        return extents.diff(layers[first.layer], first.size, layers[second.layer], second.size, self.block_size // 16)

    def info(self) -> PoolInfo:
        """Facts about the whole pool."""
        rows = self.state.names.values()
        virtual = sum(row.size for row in rows if not row.snapshot)
        total = self.allocator.capacity * self.block_size
        metadata = self.journal.disk_bytes + (self.path / "superblock").stat().st_size
        room = _available(self.path)
        free = self.allocator.free * self.block_size
        leaves = sum(len(layer.own) for layer in self.state.layers.values())
        return PoolInfo(
            path=self.path.absolute(),
            uuid=self.superblock.uuid,
            block_size=self.block_size,
            data_path=self.data.path.absolute(),
            data_total=total,
            data_used=self.allocator.used * self.block_size,
            data_available=free if is_device(self.data.path) else min(free, _available(self.data.path)),
            metadata_used=metadata,
            metadata_total=metadata + room,
            metadata_available=room,
            memory_mapping=leaves * 4 * KiB + self.allocator.total,
            volumes=len(self.state.names) - self.state.snapshots,
            snapshots=self.state.snapshots,
            layers=len(self.state.layers),
            virtual_size=virtual,
            oversubscription=virtual / total,
            journal=self.journal.bytes_since_checkpoint,
            checkpoint=self.journal.checkpoint_bytes,
            sequence=self.journal.sequence,
            failed=self.failed,
        )


def _available(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def _data_size(data: Path | None, size: int | str | None, block_size: int) -> int:
    """Bytes of data file that the pool will have."""
    device = data is not None and data.exists() and is_device(data)
    if device:
        assert data is not None
        total = device_size(data)
        if size is not None and parse_size(size) > total:
            raise Invalid(f"{data} has {format_size(total)}, less than {size}")
        if size is not None:
            total = parse_size(size)
    else:
        if data is not None and data.exists() and not data.is_file():
            raise Invalid(f"{data} is neither a file nor a block device")
        total = DEFAULT_SIZE if size is None else parse_size(size)
    total -= total % block_size
    blocks = total // block_size
    if not MIN_BLOCKS <= blocks <= MAX_BLOCKS:
        least, most = format_size(MIN_BLOCKS * block_size), format_size(MAX_BLOCKS * block_size)
        raise Invalid(f"a pool of {format_size(block_size)} blocks has {least} to {most}, not {format_size(total)}")
    return total


class _DataDraft:
    """The data file or device of a pool in the making, locked; `undo` leaves it as it was."""

    def __init__(self, path: Path, superblock: Superblock, force: bool, files: Files) -> None:
        """Raises Exists, Locked, Invalid, NoSpace or OSError."""
        self._path = path
        self._files = files
        self._superblock = superblock
        self._new = not path.exists()
        self._device = device = not self._new and is_device(path)
        self._overwritten = b""  # what stood where the header is
        # O_EXCL on a device: EBUSY while it is mounted or otherwise claimed.
        flags = (os.O_CREAT if self._new else 0) | (os.O_EXCL if device else 0)
        try:
            self._fd = files.open(path, flags)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Locked(f"{path} is in use (mounted, or part of something that is)") from error
            raise
        self._before = os.fstat(self._fd).st_size
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not force and self._holds_something(superblock.size if device else self._before):
                raise Exists(f"{path} holds something already: it is not all zeroes where it would show (--force)")
            if not device:
                files.truncate(self._fd, max(superblock.size, self._before))
        except BlockingIOError as error:
            self.undo()
            raise Locked(f"{path} is the data of a pool that is open") from error
        except OSError as error:
            self.undo()
            if error.errno in (errno.EFBIG, errno.EINVAL):
                size = format_size(superblock.size)
                raise Invalid(f"the file system cannot hold a file of {size}: {path}") from error
            raise
        except BaseException:
            self.undo()
            raise

    def _holds_something(self, size: int) -> bool:
        """File systems, partition tables and RAIDs show within the first 128 KiB or at the very end."""
        start = os.pread(self._fd, _LOOK, 0)
        end = os.pread(self._fd, _LOOK, max(size - _LOOK, 0))
        return any(start) or any(end)

    def write_header(self) -> None:
        self._overwritten = os.pread(self._fd, DATA_HEADER, 0)
        write_all(self._files, self._fd, self._superblock.data_header(), 0)
        self._files.sync(self._fd)
        if self._new:
            self._files.sync_directory(self._path.parent)

    def close(self) -> None:
        self._files.close(self._fd)

    def undo(self) -> None:
        if self._new:
            self._path.unlink(missing_ok=True)
        else:
            if self._overwritten:
                write_all(self._files, self._fd, self._overwritten, 0)
            if not self._device:
                self._files.truncate(self._fd, self._before)
        self.close()

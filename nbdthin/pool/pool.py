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
import logging
import os
import shutil
import sys
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import numpy as np

from nbdthin.compiling import mypyc_attr
from nbdthin.errors import Corrupt, Exists, Invalid, Locked, NoSpace, NotFound, PoolFailed
from nbdthin.pool import commands, du, events, explain, extents, merge, owners, space, volumemap
from nbdthin.pool.allocator import HEADER_BLOCKS, NEVER, Allocator
from nbdthin.pool.commands import Command, Draft
from nbdthin.pool.data import DataFile, device_size, is_device
from nbdthin.pool.events import Notify
from nbdthin.pool.files import FILES, Files, write_all
from nbdthin.pool.journal import FULL_DISK, Frame, Journal
from nbdthin.pool.layers import Layer, State, Words
from nbdthin.pool.limits import Limits, charged
from nbdthin.pool.policy import Policy
from nbdthin.pool.records import (
    LEAF_BYTES,
    BadRecord,
    Counter,
    End,
    Leaf,
    Name,
    Record,
    Size,
    Unname,
    Uuid,
    decode,
    encode,
)
from nbdthin.pool.rows import Extent, PoolInfo, Row, Usage
from nbdthin.pool.sums import Sums
from nbdthin.pool.superblock import DATA_HEADER, Superblock, read_superblock
from nbdthin.pool.unsynced import Unsynced
from nbdthin.pool.views import MOST_CELLS, DiskUse, Explanation, Map, Place
from nbdthin.pool.volume import JOURNAL_LOW, Shrink, Volume
from nbdthin.units import GiB, KiB, MiB, format_size, parse_size

log = logging.getLogger("nbdthin.pool")

T = TypeVar("T")

DEFAULT_SIZE = 100 * GiB  # what docker's loop pool had; sparse, so it costs nothing
REPAIRED = "repaired"  # in the pool: a repair has lost something, and a dump may still name what is in free blocks
DEFAULT_BLOCK_SIZE = 64 * KiB
BLOCK_SIZES = (16 * KiB, 1 * MiB)
MIN_BLOCKS = 16
MAX_BLOCKS = 0xFFFFFFFF  # one number is the mark of a mixed entry
_LOOK = 128 * KiB  # bytes at the start and the end of a device that tell whether it is in use
RUN_BYTES = 1 * MiB  # what a volume is given at a time, so that it stays contiguous beside others
PUNCH_BYTES = 256 * KiB  # at a time: ext4 keeps every write to the file waiting while it punches, 3.7 s for 676 MB
CHECKPOINT_JOURNAL = 8 * MiB  # journal that may grow before a checkpoint is worth its writing
_CHECKPOINT_FRAME = 16 * KiB  # encoded at a time, holding the GIL: some 20 us, which the event loop may have to wait
_EMPTY_LEAF = bytes(LEAF_BYTES)
DEFAULT_POLICY = Policy()
UNKNOWN = 1 << 40  # bytes that may wait for a sync: nobody knows how many, so as many as count as a lot
_GROWING = (commands.Create, commands.Clone, commands.Snapshot, commands.Label)  # add to the metadata

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
        self.checkpoint_lost = False  # there was no room to begin the segment behind it

    @property
    def checkpoint_due(self) -> bool:
        return self._capture is not None

    def sync(self) -> None:
        """Data, then the frame that points to it. OSError is final: `Pool.fail`.

        Raises NoSpace where the journal finds no room: nothing of the batch is durable, and `sync` may be called again.
        """
        try:
            if self._sync_data:
                self._pool.data.sync()
                self._sync_data = False
            if self._payload is not None:
                self._pool.journal.append(self._payload)
                self._payload = None
            self._start_checkpoint()
        except OSError:
            # The kernel now calls pages clean that never reached the disk: who reads them, this process or the next,
            # must not take them for what is stored.
            for drop_cache in (self._pool.data.drop_cache, self._pool.journal.drop_cache):
                with contextlib.suppress(OSError):
                    drop_cache()
            raise

    def _start_checkpoint(self) -> None:
        if self._capture is not None:
            try:
                self._number = self._pool.journal.start_segment()
            except NoSpace:
                self._capture = None
                self.checkpoint_lost = True

    def write_checkpoint(self, give_way: Callable[[], None] = lambda: None) -> None:
        """After `sync`; may run beside later batches. An OSError costs nothing: the journal stays longer.

        `give_way` is called after each frame: other threads may have the GIL while it sleeps.
        """
        assert self._capture is not None
        journal = self._pool.journal
        with contextlib.suppress(OSError):
            journal.prepare_next()  # first: it matters more than a short journal when space is short
        journal.write_checkpoint(self._number, self._paced(give_way))
        journal.finish_checkpoint(self._number)
        journal.prepare_next()  # what the checkpoint replaced may have made the room

    def _paced(self, give_way: Callable[[], None]) -> Iterator[bytes]:
        assert self._capture is not None
        for payload in self._capture.payloads():
            yield payload
            give_way()


class Capture:
    """The state at one moment, by reference: until `release`, layers replace what they would change (`Layer.put`)."""

    def __init__(self, state: State) -> None:
        self._records = state.snapshot_records()
        self._layers = list(state.layers.values())
        self._leaves = []
        for layer in self._layers:
            layer.captured = layer.own.copy()
            self._leaves.append((layer.number, layer.captured))

    def release(self) -> None:
        """Nothing is read from the leaves any more."""
        for layer in self._layers:
            layer.captured = None

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
        count = len(self._records)
        for number, leaves in self._leaves:
            for leaf, own in leaves.items():
                entries = own.tobytes()
                if entries != _EMPTY_LEAF:
                    count += 1
                    yield Leaf(number, leaf, entries)
        yield End(count)


@mypyc_attr(allow_interpreted_subclasses=True)  # tools/simulatelib has one that watches
class Pool:
    """An open pool. `Pool.init` makes one, `Pool.open` opens it under its lock.

    Used without a daemon, each verb is durable when it returns; `with pool.batch():` makes several one commit.
    """

    def __init__(
        self, path: Path, superblock: Superblock, lock: int, autocommit: bool, policy: Policy, files: Files
    ) -> None:
        self.path = path
        self.policy = policy
        self.superblock = superblock
        self.block_size = superblock.block_size
        self.failed: str | None = None  # why nothing can be made durable any more
        self.has_leftovers = False  # it was not closed: free blocks may take space in the file
        self.state = State(superblock.uuid)
        self.allocator = Allocator(superblock.size // self.block_size, max(RUN_BYTES // self.block_size, 1))
        self.limits = Limits(self.state, self.block_size)
        self.allocator.limits = self.limits.left
        self.allocator.grow = self.grow
        self.notify: Notify = lambda *_, **__: None  # who is told of events
        self._refused_size = 0  # bytes that the file system did not let it grow to, as was told
        self.journal_low = False  # the file system is full: what is left of the journal is for what frees space
        self.journal = Journal(path / "journal", files)
        self.unsynced = Unsynced(path / "journal", superblock.uuid, files)
        self.sums = Sums(path / "sums", files)
        try:
            self.data = DataFile(path / superblock.data, superblock.size, files)
            self.data.punches = policy.punch
        except BaseException:
            self.sums.close()
            raise
        self._lock = lock
        self._autocommit = autocommit
        self._records: list[Record] = []  # structural changes since the last `begin`
        self._changed: dict[int, Layer] = {}  # layers with dirty entries
        self._freed_blocks: list[int] = []  # since the last `begin`
        self._freed_arrays: list[Words] = []
        self._volumes: dict[str, Volume] = {}  # that were asked for
        self._batch: list[Command] | None = None
        self.unwritten: Batch | None = None  # packed, and not yet durable
        self._settling: set[int] = set()  # layers that the batch being made durable leaves without a name or a child
        self._sealing: set[int] = set()  # layers that it seals
        self._capture: Capture | None = None  # of the checkpoint that is being written
        # At load: where the checkpoint was read from, its last record, how many it has.
        self._checkpoint_end: tuple[Path, Record | None, int] = (self.path, None, 0)
        self._checkpoint_at = CHECKPOINT_JOURNAL  # bytes of journal
        self._epoch = 0  # counts finished batches that freed something
        self._readers: dict[int, int] = {}  # epoch -> reads under way that began in it
        self._limbo: deque[tuple[int, builtins.list[Words]]] = deque()  # freed and durable, perhaps still being read

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
            Journal.create(draft / "journal", encode([Counter(1), Uuid(superblock.uuid), End(2)]), files)
            for name in ("lock", "sums"):
                files.close(files.open(draft / name, os.O_CREAT))
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
    def open(
        cls,
        path: Path | str,
        *,
        autocommit: bool = True,
        inspect: bool = False,
        policy: Policy = DEFAULT_POLICY,
        files: Files = FILES,
    ) -> Self:
        """Open the pool at `path`: lock it, replay its journal, work out its free space.

        `autocommit` False leaves it to the caller to commit; `inspect` opens it to be looked at: nothing is written.
        `policy` says what happens when space runs short; a write that finds none is always refused.
        `files` is what writes; the real thing, or a wrapper of it that notes what it does.

        Raises NotFound, Locked, Corrupt, Invalid (its data was truncated), PoolFailed or NoSpace (what a killed process
        had answered cannot be made durable: nothing of it is lost), or OSError.
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
            pool = cls(path, superblock, lock, autocommit, policy, files)
        except BaseException:
            os.close(lock)
            raise
        try:
            pool._load(inspect)
        except BaseException:
            pool.failed = "it could not be opened"  # what a killed process left is not done with
            pool._release()
            raise
        return pool

    def _load(self, inspect: bool) -> None:
        header = os.pread(self.data.fd, DATA_HEADER, 0)
        if header != self.superblock.data_header():
            raise Corrupt(self.data.path, 0, "this is not the data of this pool, or its header is damaged")
        self.journal.load(self._replay, repair_tail=not inspect)
        path, last, count = self._checkpoint_end
        if last != End(count - 1):
            raise Corrupt(path, None, "the checkpoint is not whole")
        self.has_leftovers = self.unsynced.left and not (self.path / REPAIRED).exists()
        recovered = [] if inspect else self.read_unsynced()
        before = self._owned_blocks() if recovered else None
        self.apply_recovered(recovered)
        if self.state.size:
            self._check_grown(self.state.size)
            self.allocator.extend(self.state.size // self.block_size)
        self.state.find_unnamed()
        if inspect:
            self.failed = "it was opened to be looked at"
        self.claim_blocks()
        if not inspect:  # what was written in place may still wait in the page cache: the next flush has to reach it
            self.data.dirty = UNKNOWN
        if before is not None:
            self._commit_recovered(recovered, before)
        self.sums.todo.update((layer.number, None) for layer in self.state.layers.values() if not layer.head)
        self.sums.touched = set() if self.sums.empty else set(self.state.layers)
        # A merge that a crash took back may have given their blocks to a head, which wrote to them in place.
        self.sums.distrusted = set(self.state.mergeable)
        self.arm_growth()
        if not inspect and self.sums_lost:
            log.warning("%s is missing: checksums of what is sealed are computed anew", self.path / "sums")

    @property
    def sums_lost(self) -> bool:
        """Sealed layers may have had checksums, and their file is gone."""
        return not self.sums.exists and any(layer.own and not layer.head for layer in self.state.layers.values())

    def _commit_recovered(self, recovered: builtins.list[builtins.list[Record]], before: Words) -> None:
        """Make durable what a killed process had answered, before anything builds on it. `before`: blocks in use."""
        self.state.unsettled = {*self.state.mergeable, *self.state.prunable}
        self.state.sealing = {layer.number for layer in self.state.layers.values() if not layer.head}
        freed = self.allocator.hold(before)
        for number, records in enumerate(recovered, 1):
            last = number == len(recovered)
            # The state is that behind the last of them. A checkpoint before would have the others come on top of it,
            # with what they say of layers that are gone in the end.
            self._checkpoint_at = CHECKPOINT_JOURNAL if last else NEVER
            self._records = records
            if last and len(freed):
                self._freed_arrays = [freed]
            self.commit()
        self.unsynced.forget()

    def read_unsynced(self) -> builtins.list[builtins.list[Record]]:
        """What a process that was killed had answered beyond the journal. Raises Corrupt."""
        try:
            return self.unsynced.recover(self.journal.sequence)
        except BadRecord as error:
            raise self._bad_unsynced(error) from error

    def apply_recovered(self, recovered: builtins.list[builtins.list[Record]]) -> None:
        """Raises Corrupt."""
        try:
            for records in recovered:
                for record in records:
                    self.state.apply(record)
        except BadRecord as error:
            raise self._bad_unsynced(error) from error

    def _bad_unsynced(self, error: BadRecord) -> Corrupt:
        what = f"unflushed writes of a killed process cannot be read: {error} (remove unsynced.* to go on without)"
        return Corrupt(self.path / "journal", None, what)

    def _owned_blocks(self) -> Words:
        owned = [layer.physical_blocks() for layer in self.state.layers.values()]
        return np.concatenate(owned) if owned else np.empty(0, dtype=np.uint64)

    def _check_grown(self, size: int) -> None:
        if size % self.block_size or not self.superblock.size <= size <= MAX_BLOCKS * self.block_size:
            raise Corrupt(self.path / "journal", None, f"it gives the pool {size} bytes, which cannot be")
        self.data.check_size(size)

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
            layer.blocks = 0
            for blocks in layer.physical_parts():
                layer.blocks += len(blocks)
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
        self.unsynced.close(clean=self.failed is None and not self.has_changes)
        self.journal.close()
        self.sums.close()
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

    def remove(self, *names: str, if_exists: bool = False) -> None:
        """Remove volumes and snapshots, all or none; clones of a snapshot stay what they are.

        Raises NotFound, but for `if_exists`.
        """
        self._do(*(commands.Remove(name, if_exists=if_exists) for name in names))

    def resize(self, name: str, size: int | str) -> None:
        """Raises NotFound or Invalid. What lies behind a smaller end is gone."""
        self._do(commands.Resize(name, parse_size(size)))

    def label(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Set labels, remove those whose value is None. Raises NotFound or Invalid."""
        self._do(commands.Label(name, changes))

    def quota(self, name: str, size: int | str | None) -> None:
        """What volume `name` may take of the pool; None: all. Raises NotFound or Invalid."""
        self._do(commands.Quota(name, None if size is None else parse_size(size)))

    def reserve(self, name: str, size: int | str | None) -> None:
        """Keep space for volume `name`; None: no more. Raises NotFound, Invalid, or NoSpace: there is not enough."""
        self._do(commands.Reserve(name, None if size is None else parse_size(size)))

    def extend(self, size: int | str) -> None:
        """Make the pool larger: its data file, or what it uses of a device. Raises Invalid or OSError."""
        self._do(commands.Extend(parse_size(size)))

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
        self._check_space(wanted, draft)
        ends: builtins.list[Shrink] = []
        try:
            for name, size in draft.shrinks:
                ends.append(self.volume(name).prepare_end(size))
        except BaseException:
            for end in ends:
                end.abandon()
            raise
        if draft.size:
            self.apply([Size(draft.size)])
        self.apply(draft.records)
        for end in ends:
            end.finish()

    def _check_space(self, wanted: Sequence[Command], draft: Draft) -> None:
        """Refuse what there is no space for. Raises NoSpace or Invalid."""
        if self.journal_low and any(isinstance(command, _GROWING) for command in wanted):
            raise NoSpace(JOURNAL_LOW)
        if any(isinstance(command, commands.Create | commands.Clone) for command in wanted):
            self._check_min_free()
        if draft.size:
            draft.size = self._check_size(draft.size)
        if any(isinstance(command, commands.Reserve) for command in wanted):
            kept = self.limits.kept_after(draft.changed)
            left = self.usage().free // self.block_size + max(draft.size - self.size, 0) // self.block_size
            if kept > max(left, self.limits.kept()):
                missing = format_size((kept - left) * self.block_size)
                raise NoSpace(f"the pool cannot keep so much: {missing} are missing (nbdthin extend SIZE, or remove)")

    def _check_min_free(self) -> None:
        usage, least = self.usage(), self.policy.min_free
        if usage.free < least * usage.total:
            raise NoSpace(
                f"{format_size(usage.free)} of {format_size(usage.total)} are free, less than min_free of {least:.0%}: "
                "no new volumes or clones (remove snapshots or volumes, trim, or: nbdthin extend SIZE)"
            )

    def _check_size(self, size: int) -> int:
        """Have a data file or device of `size`; what it is then, 0 for no change. Raises Invalid or OSError."""
        size -= size % self.block_size
        if size == self.size:
            return 0
        if size < self.size:
            raise Invalid(f"the pool has {format_size(self.size)}, it cannot shrink to {format_size(size)}")
        if size > MAX_BLOCKS * self.block_size:
            raise Invalid(f"a pool of {format_size(self.block_size)} blocks has at most {MAX_BLOCKS} of them")
        try:
            self.data.grow(size)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EINVAL):
                raise Invalid(f"the file system cannot hold a file of {format_size(size)}") from error
            if error.errno in FULL_DISK:
                raise NoSpace(f"the file system refuses a file of {format_size(size)}") from error
            raise
        return size

    def apply(self, records: Iterable[Record]) -> None:
        """The live side of `State.apply`: frees what is gone, tells open volumes, notes it for the journal."""
        for record in records:
            before = self.state.names.get(record.name) if isinstance(record, Name | Unname) else None
            for layer in self.state.apply(record):
                self.discard_blocks(layer.physical_blocks())
                self.allocator.drop_run(layer.number)
                self._changed.pop(layer.number, None)
                self.sums.touched.discard(layer.number)
            if before is not None:
                self.allocator.drop_run(before.layer)
            if isinstance(record, Size):
                self._grown(record.size)
            elif isinstance(record, Name):
                if record.reservation:  # what others have at hand may be more than they may have now
                    self.allocator.drop_runs()
                volume = self._volumes.get(record.name)
                if volume is not None:
                    volume.layer = self.state.layers[record.layer]
                    volume.size = record.size
            elif isinstance(record, Unname):
                self._follow(record.name, before)
            self._records.append(record)
            self.unsynced.add(record)

    # -- size

    @property
    def size(self) -> int:
        """Bytes of data file or device that the pool uses, the header's block included."""
        return self.allocator.total * self.block_size

    def usage(self) -> Usage:
        """How full the pool is: by its own size, or by what the file system below it has left where that is less."""
        used = self.allocator.used * self.block_size
        free = self.allocator.free * self.block_size
        return Usage(used, min(free, self._room_below(used)))

    def _room_below(self, used: int) -> int:
        """Bytes that the data file can still take: what the file system has left, and what the file has at hand."""
        if self.data.is_device:
            return self.allocator.free * self.block_size
        # A file that was allocated beforehand, or one that cannot be punched, has space for blocks that are free.
        return _available(self.data.path) + max(self.data.allocated - used, 0)

    def arm_growth(self) -> None:
        """Grow, as far as the policy says so, when the pool is as full as it says."""
        may = self.policy.auto_extend and not self.data.is_device and self.failed is None
        at = int(self.policy.auto_extend_threshold * self.allocator.capacity)
        self.allocator.grow_at = at if may else NEVER

    def grow(self) -> bool:
        """Grow by the policy's step, if it says so; whether it did. Not asked again before the next `arm_growth`.

        What is new is used at once: the data file is synced before the frame that tells of it, as all data is.
        """
        self.allocator.grow_at = NEVER
        policy = self.policy
        if not policy.auto_extend or self.data.is_device or self.failed is not None:
            return False
        # Beyond what the file system can hold, size would be a promise that nobody keeps.
        used = self.allocator.used * self.block_size
        holds = used + HEADER_BLOCKS * self.block_size + self._room_below(used)
        most = min(policy.max_size or holds, holds, MAX_BLOCKS * self.block_size)
        size = min(self.size + max(int(self.size * policy.auto_extend_step), self.block_size), most)
        size -= size % self.block_size
        if size <= self.size:
            return False
        try:
            self.data.grow(size)
        except OSError as error:
            if self._refused_size != size:
                why = os.strerror(error.errno or 0)
                self.notify(events.GROWTH_FAILED, f"the pool cannot grow to {format_size(size)}: {why}", size=size)
            self._refused_size = size
            return False
        self.apply([Size(size)])
        return True

    def _grown(self, size: int) -> None:
        before = self.size
        self.allocator.extend(size // self.block_size)
        self.arm_growth()
        what = f"the pool has grown from {format_size(before)} to {format_size(size)}"
        self.notify(events.EXTENDED, what, before=before, size=size)

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

    def opened(self, name: str) -> Volume | None:
        """What `volume` returned for `name`, if anybody asked."""
        return self._volumes.get(name)

    # -- what volumes and merges do to the mapping

    def put(self, layer: Layer, block: int, entry: int) -> None:
        assert self.state.layers.get(layer.number) is layer
        layer.put(block, entry)
        self._changed[layer.number] = layer
        self.unsynced.put(layer.number, block, entry)

    def put_leaf(self, layer: Layer, leaf: int, entries: array[int] | None) -> None:
        assert self.state.layers.get(layer.number) is layer
        layer.put_leaf(leaf, entries)
        self._changed[layer.number] = layer
        self.unsynced.add(Leaf(layer.number, leaf, b"" if entries is None else entries.tobytes()))

    def drop_leaves(self, layer: Layer, leaves: Sequence[int]) -> None:
        """Let go of own leaves of a layer, and free their blocks."""
        assert self.state.layers.get(layer.number) is layer
        if leaves:
            self.discard_blocks(layer.drop_leaves(leaves))
            self._changed[layer.number] = layer
            for leaf in leaves:
                self.unsynced.add(Leaf(layer.number, leaf, b""))

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

    def check_journal(self) -> None:
        """Raises NoSpace where what is left of the journal is for commands that remove something."""
        if self.journal_low and self.journal.last:
            raise NoSpace(JOURNAL_LOW)

    def note_journal(self) -> None:
        """See how much room the journal has, after anything that may have changed it."""
        self.journal_low = self.journal.low

    def check_writable(self) -> None:
        if self.failed is not None:
            raise PoolFailed(f"the pool is read-only: {self.failed}")

    # -- commit

    @property
    def has_changes(self) -> bool:
        """Something is not durable yet."""
        return self.unwritten is not None or self._has_new

    @property
    def _has_new(self) -> bool:
        return bool(self._records or self._changed or self.data.dirty)

    @property
    def overwritten(self) -> int:
        """Bytes of data, about, that are all that a commit would have to sync; 0 where there is more to it."""
        return 0 if self._records or self._changed or self.unwritten is not None else self.data.dirty

    def begin(self) -> Batch:
        """Pack what has changed. Raises PoolFailed. The batch before must be finished."""
        self.check_writable()
        assert self.unwritten is None
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
        self._sealing, self.state.sealing = self.state.sealing, set()
        sync_data = bool(self.data.dirty)
        if sync_data:  # only then: what a thread has written since that look must not be forgotten
            self.data.dirty = 0
        journal = self.journal
        payload = encode(records) if records else None
        if payload is not None:
            self.unsynced.next_batch()
        grown = journal.bytes_since_checkpoint + (len(payload) if payload is not None else 0)
        capture = None
        if self._capture is None and grown > max(self._checkpoint_at, journal.checkpoint_bytes):
            self._capture = capture = Capture(self.state)
        self.unwritten = Batch(self, payload, sync_data, freed, capture)
        return self.unwritten

    def finish(self, batch: Batch) -> None:
        """`batch` is durable."""
        self.unwritten = None
        self._settling = set()
        self.sums.todo.update(dict.fromkeys(self._sealing))
        self._sealing = set()
        self.note_journal()
        if batch.checkpoint_lost:
            self.checkpoint_ended(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if batch.freed:
            self._limbo.append((self._epoch, batch.freed))
            self._epoch += 1

    def checkpoint_ended(self, error: OSError | None) -> None:
        """The checkpoint of a batch was written, or not: then the next try is some way off."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None
        grown = self.journal.bytes_since_checkpoint if error is not None else 0
        self._checkpoint_at = grown + CHECKPOINT_JOURNAL

    def fail(self, error: OSError) -> None:
        """A sync failed: from now on the pool is read-only."""
        self.unsynced.clear()
        self.unwritten = None  # never again
        if self.failed is None:
            self.failed = f"a sync failed ({os.strerror(error.errno or errno.EIO)}); check the disk, then restart"

    def commit(self) -> None:
        """Make everything so far durable, in this thread.

        Raises PoolFailed, or NoSpace where the journal finds no room: then it is tried again with the next commit.
        """
        self.check_writable()
        if self.unwritten is not None:
            self._write(self.unwritten)
        if self._has_new:
            self._write(self.begin())
        while (blocks := self.take_reclaimable()) is not None:
            self.punch(blocks)
            self.allocator.release(blocks)
        if not self.journal.next_ready:
            with contextlib.suppress(OSError):
                self.journal.prepare_next()
            self.note_journal()
        self.arm_growth()

    def _write(self, batch: Batch) -> None:
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
        return np.concatenate(self._limbo.popleft()[1]) if self.can_reclaim else None

    def reclaim_again(self, blocks: Words) -> None:
        """Pending blocks that are not among those to be reclaimed: what `take_reclaimable` returned, for one."""
        self._limbo.append((self._epoch, [blocks]))
        self._epoch += 1  # reads that begin from now on know nothing of them

    def sweep(self, start: int, end: int) -> None:
        """Have the free blocks between two bytes of the data file reclaimed as if they had just been freed."""
        blocks = self.allocator.hold_free(start // self.block_size, -(-end // self.block_size))
        if len(blocks):
            self.reclaim_again(blocks)

    def punch(self, blocks: Words, give_way: Callable[[], None] = lambda: None) -> None:
        """Give the space of `blocks` back to the file system. An error there loses space, not data.

        `give_way` is called after each piece.
        """
        ordered = np.sort(blocks)
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        for run in np.split(ordered, breaks):
            start, end = int(run[0]) * self.block_size, (int(run[-1]) + 1) * self.block_size
            for position in range(start, end, PUNCH_BYTES):
                with contextlib.suppress(OSError):
                    self.data.punch(position, min(PUNCH_BYTES, end - position))
                give_way()

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

    def is_sealed(self, layer: Layer) -> bool:
        """What the layer shows never changes again, whatever a crash takes back."""
        number = layer.number
        return not layer.head and number not in self.state.sealing and number not in self._sealing

    # -- queries

    def list(self, *, deferred: bool = False) -> builtins.list[Row]:
        """Every volume and snapshot, by name; or, `deferred`, what was removed while it was in use."""
        names = self.state.deferred if deferred else self.state.names.keys() - self.state.deferred.keys()
        return [self._row(self.state.names[name]) for name in sorted(names)]

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
            quota=row.quota or None,
            reservation=row.reservation or None,
            charged=0 if row.snapshot else charged(layer, row.origin) * self.block_size,
        )

    def diff(self, before: str, after: str) -> builtins.list[Extent]:
        """Where snapshot `after` may differ from `before`: what was written between them and their common ancestor.

        Costs what changed, not the size. Raises NotFound, or Invalid for a volume.
        """
        for name in (before, after):
            row = self.state.names.get(name)
            if row is None:
                raise NotFound(f"no snapshot {name!r} (`nbdthin ls` lists what there is)")
            if not row.snapshot:
                raise Invalid(f"{name!r} is a volume, which changes: take a snapshot of it first")
        return self.delta(before, after)

    def delta(self, before: str, after: str) -> builtins.list[Extent]:
        """The same for volumes too, as they are at this moment: for a pool that nobody writes to. Raises NotFound."""
        layers, rows = [], []
        for name in (before, after):
            row = self.state.names.get(name)
            if row is None:
                raise NotFound(f"no volume or snapshot {name!r}")
            layers.append(self.state.layers[row.layer])
            rows.append(row)
        return extents.diff(layers[0], rows[0].size, layers[1], rows[1].size, self.block_size // 16)

    def owners(self, position: int | str, length: int | str = 1) -> builtins.list[Place]:
        """Whose `length` bytes at `position` of the data file are: a look from the other side. Goes over all that is
        mapped, and so is for a pool that nobody serves. Raises Invalid outside of the data.
        """
        return owners.owners(self, parse_size(position), parse_size(length))

    def explain(self, name: str, offset: int | str, length: int | str | None = None) -> Explanation:
        """The way of a read of the byte at `offset`, and of a write of `length` there: by default of its subblock.

        Raises NotFound, or Invalid outside of the volume.
        """
        seen = explain.explain(self, name, parse_size(offset), None if length is None else parse_size(length))
        return replace(seen, checksum=explain.has_checksum(self, seen))

    def map(self, name: str, cells: int = MOST_CELLS) -> Map:
        """Which layers a volume's data comes from, in up to `cells` parts, and how scattered it is.

        Raises NotFound or Invalid.
        """
        return _finished(volumemap.survey(self, name, cells))

    def du(self, *names: str) -> DiskUse:
        """What `names` take, and what removing them all at once frees; of everything without any. Raises NotFound."""
        return _finished(du.disk_use(self, names))

    def info(self) -> PoolInfo:
        """Facts about the whole pool."""
        rows = self.state.names.values()
        deferred = [self.state.names[name] for name in self.state.deferred]
        snapshots = self.state.snapshots - sum(row.snapshot for row in deferred)
        virtual = sum(row.size for row in rows if not row.snapshot)
        total = self.allocator.capacity * self.block_size
        metadata = self.journal.disk_bytes + (self.path / "superblock").stat().st_size
        room = _available(self.path)
        leaves = sum(len(layer.own) for layer in self.state.layers.values())
        usage = self.usage()
        return PoolInfo(
            path=self.path.absolute(),
            uuid=self.superblock.uuid,
            block_size=self.block_size,
            data_path=self.data.path.absolute(),
            data_total=total,
            data_used=self.allocator.used * self.block_size,
            data_available=usage.free,
            data_reserved=self.limits.kept() * self.block_size,
            min_free=int(self.policy.min_free * usage.total),
            metadata_used=metadata,
            metadata_total=metadata + room,
            metadata_available=room,
            memory_mapping=leaves * 4 * KiB + self.allocator.total,
            volumes=len(rows) - len(deferred) - snapshots,
            snapshots=snapshots,
            deferred=len(deferred),
            deferred_held=sum(space.exclusive(self.state.layers[row.layer]) for row in deferred) * self.block_size,
            layers=len(self.state.layers),
            merging=len(self.state.mergeable) + len(self.state.prunable),
            virtual_size=virtual,
            oversubscription=virtual / total,
            journal=self.journal.bytes_since_checkpoint,
            checkpoint=self.journal.checkpoint_bytes,
            sequence=self.journal.sequence,
            failed=self.failed,
        )


def _finished(steps: Generator[None, None, T]) -> T:
    """All the steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(T, end.value)


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

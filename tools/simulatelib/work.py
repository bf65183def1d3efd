"""Seeded work on the synchronous engine: everything that a pool can be asked, with more of it in the middle of things.

What live.py leaves to threads happens here between the calls that those threads make: the recorder calls back before
each, and there, by chance, other work is done. So a run is one thread and the same every time, yet writes come between
the two syncs of a commit, commits inside a checkpoint, and commands while a merge copies. The rules are those of
live.py: one commit at a time, one merge at a time, one piece of upkeep at a time; who holds blocks keeps others off.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice

from nbdthin.errors import Error, NoSpace, PoolFailed
from nbdthin.pool import commands, merge, sums
from nbdthin.pool.commands import Command
from nbdthin.pool.layers import LEAF_SHIFT
from nbdthin.pool.live import _changed as changed_by
from nbdthin.pool.live import _needs_unused as needs_unused
from nbdthin.pool.records import is_deferred
from nbdthin.pool.volume import Volume, Write
from simulatelib.oracle import Change, Frozen, Head, Lost, Oracle, payload
from simulatelib.record import Recorder
from simulatelib.watched import FIXED, WatchedPool

MOST_NAMES = 7
DEEPEST = 3  # work inside work inside work


@dataclass(eq=False)
class SlowWrite:
    """A write that spends time in a thread."""

    name: str
    volume: Volume
    write: Write
    change: Change
    epoch: int
    performed: bool = False


@dataclass(eq=False)
class Reading:
    """A read that spends time in a thread."""

    name: str
    volume: Volume
    segments: list[tuple[int, int]]
    expected: bytes
    head: Head | None  # of a volume, which may be written meanwhile
    begun: int
    epoch: int


class Work:
    def __init__(self, chance: random.Random, recorder: Recorder, pool: WatchedPool, *, nested: bool = True) -> None:
        """`nested`: work comes in the middle of other work, too."""
        self._nested = nested
        self.errors: list[OSError] = []  # that requests, commands and merges met
        self.chance = chance
        self.recorder = recorder
        self.pool = pool
        self._count = 0
        self._depth = 0
        self._may_interrupt = 0.0  # probability of more work before a call of the recorder
        self._committing = False
        self._merging = False
        self._pruning: Iterator[None] | None = None
        self._upkeep: deque[Callable[[], None]] = deque()
        self._upkeep_busy = False
        self._held: list[tuple[str, int, int]] = []  # (volume, first block, last block)
        self._slow: list[SlowWrite] = []
        self._readings: list[Reading] = []
        recorder.before = self._interrupt

    @property
    def oracle(self) -> Oracle:
        assert self.pool.oracle is not None
        return self.pool.oracle

    # -- running

    def run(self, steps: int) -> None:
        def all_steps(work: Work) -> None:
            for step in range(steps):
                work.step()
                if step % 25 == 24:
                    work.verify()

        self.run_one(all_steps)

    def run_one(self, history: Callable[[Work], None]) -> None:
        """To its end, or until a sync fails."""
        try:
            history(self)
            self.finish()
        except PoolFailed:
            self._failed()

    def _failed(self) -> None:
        """A sync failed: reads go on, all else is refused."""
        self._may_interrupt = 0.0
        self.recorder.before = None
        pool = self.pool
        assert pool.failed is not None
        for refused in (lambda: pool.execute([]), pool.begin, pool.commit):
            try:
                refused()
            except PoolFailed:
                continue
            raise Lost("a pool whose sync failed goes on")
        self.verify()

    def finish(self) -> None:
        """End what is under way; the pool stays open."""
        while self._slow:
            self.end_slow_write()
        while self._readings:
            self.end_read()
        self.verify()

    def step(self) -> None:
        kind = self.chance.choices(_KINDS, _WEIGHTS)[0]
        kind(self)
        if self.chance.random() < 0.3:  # replies leave
            self.pool.unsynced.publish()

    def _interrupt(self) -> None:
        """Called before each call that the engine makes of its files."""
        if (
            self._nested
            and self._may_interrupt
            and self._depth < DEEPEST
            and self.chance.random() < self._may_interrupt
        ):
            self.step()

    @contextmanager
    def _interruptible(self, probability: float) -> Iterator[None]:
        before, self._may_interrupt = self._may_interrupt, probability
        self._depth += 1
        try:
            yield
        finally:
            self._may_interrupt = before
            self._depth -= 1

    # -- choosing

    def _volumes(self) -> list[str]:
        return [name for name, image in self.oracle.images.items() if isinstance(image.kept, Head)]

    def _snapshots(self) -> list[str]:
        return [name for name, image in self.oracle.images.items() if isinstance(image.kept, Frozen)]

    def _new_name(self) -> str:
        while f"n{self._count}" in self.oracle.images:
            self._count += 1
        return f"n{self._count}"

    def _size(self) -> int:
        sub, block = self.pool.block_size // 16, self.pool.block_size
        parts = self.chance.choice(((3, 0, 0), (1, 0, 0), (2, 3, 512), (1, 15, 512), (4, 1, 0), (0, 1, 512), (5, 8, 0)))
        return parts[0] * block + parts[1] * sub + parts[2]

    def _range(self, name: str) -> tuple[int, int]:
        """Somewhere in a volume, on and beside the boundaries there are."""
        chance, block = self.chance, self.pool.block_size
        sub, size = block // 16, self.oracle.images[name].size
        offset = chance.randrange(-(-size // block)) * block
        if chance.random() < 0.7:
            offset += chance.randrange(16) * sub
        if chance.random() < 0.3:
            offset += chance.choice((1, 511, 512, 513, 700))
        offset = min(offset, size - 1)
        length = chance.choice(
            (1, 512, sub, sub, 2 * sub, 3 * sub + 7, 8 * sub, block, block, block + 512, 2 * block + sub)
        )
        return offset, min(length, size - offset)

    def _is_held(self, name: str, offset: int = 0, length: int = 1 << 40) -> bool:
        block = self.pool.block_size
        first, last = offset // block, (offset + length - 1) // block
        return any(held == name and start <= last and first <= end for held, start, end in self._held)

    # -- I/O

    def write(self) -> None:
        if not (names := self._volumes()):
            return
        name = self.chance.choice(names)
        offset, length = self._range(name)
        if not self._is_held(name, offset, length):
            self.write_at(name, offset, length)

    def write_at(self, name: str, offset: int, length: int) -> bool:
        """False: there is no space."""
        data = payload(self.chance, length)
        volume = self.pool.volume(name)
        change = self.oracle.begin_change(name, offset, data)
        try:
            with self._uninterrupted():
                if not (self.chance.random() < 0.7 and volume.write_small(offset, memoryview(data))):
                    volume.write(offset, data)
        except NoSpace:
            self.oracle.drop_change(change)
            return False
        except OSError as error:
            self.oracle.fail_change(change)
            self.errors.append(error)
            return False
        self.oracle.end_change(name, change)
        return True

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        before, self._may_interrupt = self._may_interrupt, 0.0
        try:
            yield
        finally:
            self._may_interrupt = before

    def trim(self) -> None:
        if not (names := self._volumes()):
            return
        name = self.chance.choice(names)
        offset, length = self._range(name)
        if not self._is_held(name, offset, length):
            self.trim_at(name, offset, length)

    def trim_at(self, name: str, offset: int, length: int) -> None:
        self.pool.volume(name).trim(offset, length)
        self._zeroed(name, offset, length)

    def _zeroed(self, name: str, offset: int, length: int) -> None:
        start, stop = self.oracle.whole(name, offset, length)
        if start < stop:
            self.oracle.end_change(name, self.oracle.begin_change(name, start, bytes(stop - start), mapped=True))

    def zero(self) -> None:
        if not (names := self._volumes()):
            return
        name = self.chance.choice(names)
        offset, length = self._range(name)
        if self._is_held(name, offset, length):
            return
        start, stop = self.oracle.whole(name, offset, length)
        edges = [(offset, min(start, offset + length)), (max(stop, offset), offset + length)]
        changes = [self.oracle.begin_change(name, a, bytes(b - a)) for a, b in edges if a < b]
        try:
            with self._uninterrupted():
                self.pool.volume(name).write_zeroes(offset, length, allocate=self.chance.random() < 0.3)
        except NoSpace:
            for change in changes:
                self.oracle.drop_change(change)
        else:
            for change in changes:
                self.oracle.end_change(name, change)
            self._zeroed(name, offset, length)

    def slow_write(self) -> None:
        """Begin a write that ends later, or let one go on."""
        if len(self._slow) >= 2:
            self.end_slow_write()
            return
        if not (names := self._volumes()):
            return
        name = self.chance.choice(names)
        offset, length = self._range(name)
        if self._is_held(name, offset, length):
            return
        volume = self.pool.volume(name)
        data = payload(self.chance, length)
        try:
            write = volume.reserve(offset, length)
        except NoSpace:
            return
        block = self.pool.block_size
        self._held.append((name, offset // block, (offset + length - 1) // block))
        change = self.oracle.begin_change(name, offset, data)
        self._slow.append(SlowWrite(name, volume, write, change, self.pool.enter()))

    def end_slow_write(self) -> None:
        if not self._slow:
            return
        slow = self.chance.choice(self._slow)
        if not slow.performed:
            slow.performed = True
            with self._uninterrupted():
                slow.write.perform(memoryview(slow.change.data))
            return
        self._slow.remove(slow)
        self.pool.leave(slow.epoch)
        slow.volume.finish(slow.write)
        self.oracle.end_change(slow.name, slow.change)
        block, change = self.pool.block_size, slow.change
        self._held.remove((slow.name, change.offset // block, (change.offset + len(change.data) - 1) // block))

    def read(self) -> None:
        """Begin a read that ends later."""
        if len(self._readings) >= 2:
            self.end_read()
        elif self.oracle.images:
            name = self.chance.choice(list(self.oracle.images))
            image = self.oracle.images[name]
            volume = self.pool.volume(name)
            segments = volume.segments(0, image.size)
            head = image.kept if isinstance(image.kept, Head) else None
            begun = self.recorder.note(f"read of {name} begins")
            reading = Reading(name, volume, segments, image.content(), head, begun, self.pool.enter())
            self._readings.append(reading)

    def end_read(self) -> None:
        if not self._readings:
            return
        reading = self._readings.pop(self.chance.randrange(len(self._readings)))
        found = bytearray(len(reading.expected))
        reading.volume.read_segments(reading.segments, memoryview(found))
        self.pool.leave(reading.epoch)
        end = self.recorder.note(f"read of {reading.name} ends")
        self.oracle.check_read(reading.name, bytes(found), reading.expected, reading.head, reading.begun, end)

    # -- commands

    def command(self) -> None:
        wanted = [self._command() for _ in range(self.chance.choice((1, 1, 1, 1, 2, 3)))]
        if any(self._is_held(name) for command in wanted for name in changed_by(command)):
            return
        read = {reading.name for reading in self._readings}
        if any(needs_unused(command, self.pool.state.names)[1] in read for command in wanted):
            return
        self.execute(*wanted)

    def execute(self, *wanted: Command) -> None:
        try:
            with self._uninterrupted():
                self.pool.execute(wanted)
        except PoolFailed:
            raise
        except OSError as error:
            self.errors.append(error)
        except Error:
            self.recorder.note("refused: " + ", ".join(map(str, wanted)))

    def _command(self) -> Command:
        chance = self.chance
        there = list(self.oracle.images)
        names = [name for name in there if not is_deferred(name)]
        volumes = [name for name in self._volumes() if name in names]
        snapshots = [name for name in self._snapshots() if name in names]
        kind = chance.choice(_COMMANDS)
        if (kind in ("create", "snapshot", "clone") and len(there) >= MOST_NAMES) or not volumes:
            kind = "remove" if len(there) >= MOST_NAMES else "create"
        if kind in ("free", "remove") and len(names) < len(there) and (kind == "free" or not names):
            return commands.Remove(chance.choice([name for name in there if name not in names]))
        if kind in ("clone", "rollback") and not snapshots:
            kind = "snapshot"
        labels = {"step": str(self._count)} if chance.random() < 0.3 else {}
        match kind:
            case "create":
                return commands.Create(self._new_name(), self._size(), labels)
            case "snapshot":
                return commands.Snapshot(chance.choice(volumes), self._new_name(), labels)
            case "clone":
                name = chance.choice(snapshots)
                larger = self.oracle.images[name].size + 512 if chance.random() < 0.2 else None
                return commands.Clone(name, self._new_name(), larger, labels)
            case "rollback":
                return commands.Rollback(chance.choice(volumes), chance.choice(snapshots))
            case "rename":
                return commands.Rename(chance.choice(names), self._new_name())
            case "resize":
                return commands.Resize(chance.choice(volumes), self._size())
            case "defer":
                return commands.Remove(chance.choice(names), deferred=True)
            case "label":
                return commands.Label(chance.choice(names), {"at": str(len(self.recorder.log)), "step": None})
            case _:
                return commands.Remove(chance.choice(snapshots if snapshots and chance.random() < 0.7 else names))

    # -- commits

    def commit(self) -> None:
        if self._committing:
            return
        pool, chance = self.pool, self.chance
        flush = self.oracle.ask_flush()
        if chance.random() < 0.3 and not self._upkeep_busy:
            self._commit_at_once()
            self.oracle.flushed(flush)
            return
        if pool.has_changes:
            self._committing = True
            batch = pool.begin()
            with self._interruptible(0.4):
                try:
                    try:
                        batch.sync()
                    except NoSpace:  # live.py tries again when there may be room
                        batch.sync()
                except OSError as error:
                    pool.fail(error)
                    raise PoolFailed(str(error)) from error
                self._interrupt()  # the thread is done, the loop does not know yet
            pool.finish(batch)
            self._committing = False
            if batch.checkpoint_due:

                def checkpoint() -> None:
                    try:
                        batch.write_checkpoint()
                    except OSError as error:
                        pool.checkpoint_ended(error)
                    else:
                        pool.checkpoint_ended(None)

                self._upkeep.append(checkpoint)
            elif not pool.journal.next_ready and chance.random() < 0.5:
                self._upkeep.append(self._prepare_next)
        self.oracle.flushed(flush)
        if chance.random() < 0.8:
            self.upkeep()

    def _commit_at_once(self) -> None:
        with self._uninterrupted():
            try:
                self.pool.commit()
            except NoSpace:  # for the journal; nothing is lost
                self.pool.commit()

    def _prepare_next(self) -> None:
        with suppress(OSError):
            self.pool.journal.prepare_next()

    def checkpoint(self) -> None:
        self.pool.want_checkpoint = True
        self.commit()

    def upkeep(self) -> None:
        """What live.py's upkeep thread does: checkpoints, and giving freed space back."""
        if self._upkeep_busy:
            return
        self._upkeep_busy = True
        pool = self.pool
        with self._interruptible(0.25):
            while self._upkeep:
                self._upkeep.popleft()()
            while (blocks := pool.take_reclaimable()) is not None:
                pool.punch(blocks)
                pool.allocator.release(blocks)
        self._upkeep_busy = False

    # -- merging

    def merge(self) -> None:
        """One step of a merge or pruning."""
        if self._merging:
            return
        self._merging = True
        if self._pruning is not None:
            if next(self._pruning, "end") == "end":
                self._pruning = None
        elif (parent := self.pool.next_unnamed()) is not None:
            if parent.number in self.pool.state.prunable:
                self._pruning = merge.prune(self.pool, parent)
            else:
                self._merge_leaf(parent.number)
        self._merging = False

    def _merge_leaf(self, number: int) -> None:
        pool = self.pool
        parent = pool.state.layers[number]
        child = merge.child_of(pool, parent)
        assert child is not None
        if not parent.own:
            merge.unlink(pool, parent, child)
            return
        if child.head and any(name == child.name for name, _, _ in self._held):
            return  # live.py waits for them
        step = merge.Step(pool, parent, child, merge.next_leaves(parent))
        held = []
        if child.head and child.name is not None:
            held = [(child.name, block, block) for block in step.blocks]
            if not held:  # commands on the volume wait all the same
                last = (step.leaves[0] + 1 << LEAF_SHIFT) - 1
                held = [(child.name, last, last)]
        self._held += held
        epoch = pool.enter()
        try:
            with self._interruptible(0.2):
                step.copy()
                self._interrupt()
        except OSError as error:
            self.errors.append(error)
            return
        finally:
            pool.leave(epoch)
            for each in held:
                self._held.remove(each)
        if merge.child_of(pool, parent) is child:
            step.finish()

    def compute_sums(self) -> None:
        """Some pieces of it."""
        if self._merging:
            return  # they exclude each other, by a lock
        with self._uninterrupted():
            for piece in islice(sums.missing(self.pool), 20):
                piece.run()

    # -- the rest

    def reopen(self) -> None:
        if self._depth:
            return
        self.finish()
        flush = self.oracle.ask_flush()
        oracle = self.oracle
        self._upkeep.clear()
        self._pruning = None
        self._commit_at_once()
        with self._uninterrupted():
            oracle.flushed(flush)
            self.pool.close()
            self.pool = self._open(oracle)

    def kill(self) -> None:
        """The process ends, the machine goes on: another process has everything that was answered."""
        if self._depth:
            return
        self.finish()
        self.pool.unsynced.publish()
        oracle = self.oracle
        self._upkeep.clear()
        self._pruning = None
        with self._uninterrupted():
            end_process(self.pool)
            self.pool = self._open(oracle)
        self.verify()

    def _open(self, oracle: Oracle) -> WatchedPool:
        """Open the pool again, as a daemon does."""

        class Reopened(WatchedPool):  # it may commit while it is opened
            pass

        Reopened.oracle = oracle
        # A start whose sync is refused is a start that failed: tests/pool/test_unsynced.py has those.
        syncs_left, self.recorder.syncs_left = self.recorder.syncs_left, None
        pool = Reopened.open(self.pool.path, autocommit=False, files=self.recorder, policy=FIXED)
        self.recorder.syncs_left = syncs_left
        pool.serve()
        return pool

    def verify(self) -> None:
        """What is read now is what was written last."""
        if self.pool.state.names.keys() != self.oracle.images.keys():
            raise Lost(f"the pool has {sorted(self.pool.state.names)}, not {sorted(self.oracle.images)}")
        for name, image in self.oracle.images.items():
            found = self.pool.volume(name).read(0, image.size)
            under_way = [change for head, change in self.oracle.active() if head is image.kept]
            self.oracle.check_now(name, found, under_way)


def end_process(pool: WatchedPool) -> None:
    """As SIGKILL does."""
    pool.unsynced.close(clean=False)
    pool.journal.close()
    pool.sums.close()
    pool.data.close()
    os.close(pool._lock)


_COMMANDS = (
    *("create", "snapshot", "snapshot", "snapshot", "clone", "clone", "rollback"),
    *("rename", "remove", "remove", "remove", "resize", "resize", "label", "defer", "defer", "free", "free"),
)
_TABLE: tuple[tuple[Callable[[Work], None], int], ...] = (
    (Work.write, 30),
    (Work.kill, 1),
    (Work.trim, 5),
    (Work.zero, 4),
    (Work.slow_write, 6),
    (Work.end_slow_write, 8),
    (Work.read, 4),
    (Work.end_read, 4),
    (Work.command, 14),
    (Work.commit, 14),
    (Work.checkpoint, 2),
    (Work.upkeep, 4),
    (Work.merge, 14),
    (Work.compute_sums, 8),
    (Work.reopen, 1),
)
_KINDS = [kind for kind, _ in _TABLE]
_WEIGHTS = [weight for _, weight in _TABLE]

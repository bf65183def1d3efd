"""The pool in one event loop: group commit, I/O in threads where it may block, merging in the background.

This is the one place that orders data, journal and reply. `commit` answers when everything that was changed before the
call is durable; callers that ask while a commit is under way share the next one. What keeps concurrent work apart:

- state changes only in the event loop, and no `await` stands between deciding and reserving;
- a write that spends time in a thread *holds* its blocks; whoever wants one of them waits;
- a snapshot, like every command on a volume, *gates* it: new writes wait, those under way are waited for;
- a thread that reads or writes the data file has *entered* (`Pool.enter`): what is freed meanwhile is not reused;
- a write that finds no space lets go of its blocks before it waits for some, so that nothing ever waits for it;
- a commit that finds no room in the journal has not failed: it is tried again; who waits for it is told after a while.

How clients share one volume is in livevolume.py, what becomes of checksums in verifying.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

from nbdthin.errors import InUse, NoSpace, OverQuota, PoolFailed
from nbdthin.pool import commands, events, merge
from nbdthin.pool.commands import Command
from nbdthin.pool.crowd import Crowd
from nbdthin.pool.data import is_device
from nbdthin.pool.events import Event, Events, Levels, Listener
from nbdthin.pool.journal import FULL_DISK
from nbdthin.pool.layers import Layer
from nbdthin.pool.lenders import Lenders
from nbdthin.pool.livevolume import DiskFull, LiveVolume
from nbdthin.pool.policy import QUEUE
from nbdthin.pool.pool import Batch, Pool
from nbdthin.pool.readers import Readers
from nbdthin.pool.records import Name, former_name, is_deferred
from nbdthin.pool.rows import Row
from nbdthin.pool.threads import Threads
from nbdthin.pool.verifying import SCRUB_RATE, Verifier
from nbdthin.pool.waiting import GivenUp, Waiting
from nbdthin.units import KiB, MiB, format_size

COMMIT_INTERVAL = (
    5.0  # seconds: what nobody asked to be durable is so after this long, as with the kernel's file systems
)
IO_THREADS = 16  # reads that the page cache cannot answer, large writes: enough to keep a disk's queue full
QUICK_SYNC = 0.001  # seconds; a sync that takes less the loop may do itself
SLOW_SYNC = 0.0005  # seconds; a sync that takes longer waits for all who are about to ask for one
MOST_GATHERING = 0.005  # seconds
MANY = 4  # who may still ask for a sync: for so many a turn of the loop is waited
FLUSHES = 8  # since anybody did anything else, from which on the loop may do it for several clients
LITTLE = 256 * KiB  # bytes to be synced, at most, when the loop does it
PREPARE_AGAIN = 30.0  # seconds until the next try to get room for a journal segment
POLL = 1.0  # seconds between looks at a full file system while somebody waits for it: others free space unseen
COME_BACK = 60.0  # seconds for which clients may come back to what was removed, where they cannot have meant to go
SWEEP = 64 * MiB  # bytes of data file whose free blocks are out of reach while their space is given back
CHECKPOINT_PAUSE = 0.002  # seconds after each frame of 16 KiB: so few reads meet one that their p99 does not show it
LENT_AGAIN = 0.05  # seconds until blocks that clients had still to read are looked at again
PUNCH_PAUSE = 0.0003  # seconds after each hole, which takes 30 us
MERGE_PAUSES = 50  # times as long as it took is the pause after each step of a merge
MERGE_PAUSE = 0.05  # seconds; at most so long, on disks where copying takes its time
MERGE_BEHIND = 3  # layers waiting to be merged from which on there are no pauses
MERGE_MOST = 32  # from which on a command that leaves another waits for one of them
MERGE_WAIT = 1.0  # seconds, at most
SHORT = 10  # none of these pauses when less than a tenth of the pool is free
MERGE_COMMIT = 64  # leaves merged before what they freed is committed, and so can be reused

log = logging.getLogger("nbdthin.pool")

T = TypeVar("T")
Told = tuple[str, str, dict[str, object]]  # an event: kind, message, facts


class LivePool:
    """An open pool (autocommit off) in the running event loop. `close` before the loop ends."""

    def __init__(self, pool: Pool, scrub_rate: int = SCRUB_RATE) -> None:
        """`scrub_rate` is bytes a second, for scrubs and for computing the checksums that are missing."""
        self.pool = pool
        self.verifier = Verifier(self, scrub_rate)
        self.users: Callable[[str], tuple[str, ...]] = lambda _: ()  # who holds a name; the server's to say
        self.no_space: Callable[[str], str | None] = lambda _: None  # the policy for a name, where it is not the pool's
        self.events = Events()
        pool.notify = self.events.notify
        self._levels = Levels(pool.policy.low_water)
        self._space = Waiting()  # writes
        self._room = Waiting()  # a commit, for room in the journal
        self._freeing: asyncio.Task[None] | None = None  # a commit for those who wait
        self._free_when_full: int | None = None  # bytes that were free when a write last found no space; None: it does
        self._over_quota: set[str] = set()  # volumes of which it was told
        self._starved = False  # of room for the journal, as was told
        self._watched = -1  # blocks in use when usage was looked at last
        self.commits = 0  # batches made durable
        self._loop = asyncio.get_running_loop()
        self._io = Threads(self._loop, IO_THREADS, "nbdthin-io")
        self.readers = Readers(self._loop, self._io, pool.data, self.enter, self.leave)
        self._sync = Threads(self._loop, 1, "nbdthin-sync")  # its own: cold reads must not hold up a commit
        self._upkeep = Threads(self._loop, 1, "nbdthin-upkeep")  # checkpoints, hole punching
        self._next_leave: asyncio.Future[None] = self._loop.create_future()  # done when some thread's I/O ends
        self._structure = asyncio.Lock()  # one set of commands at a time
        # Futures, and since when somebody waits for them: of the batch that has not begun, and of the one under way.
        self._next_batch: asyncio.Future[None] | None = None
        self._next_since = 0.0
        self._served: asyncio.Future[None] | None = None
        self._served_since = 0.0
        self._committing: asyncio.Task[None] | None = None
        self._sync_took = QUICK_SYNC  # seconds, the last time
        self.flushes = 0  # since a client sent who does not flush each of his writes, and may wait for the loop
        self._crowd = Crowd()  # who asks for syncs
        self._reclaiming: asyncio.Task[None] | None = None
        self.lenders = Lenders(pool.block_size)
        self._tasks: set[asyncio.Task[None]] = set()
        self.merging: asyncio.Task[None] | None = None  # the merge of layers without a name, while there are any
        self._merges = Waiting()  # commands, for a layer that is merged
        self._merged_leaves = 0  # since what merging freed was committed
        self._preparing: asyncio.Task[None] | None = None
        self._prepare_at = 0.0  # loop time
        self._unmergeable: set[int] = set()  # layers whose merge met an I/O error: left for the next start
        self._timer = self._loop.call_later(COMMIT_INTERVAL, self._tick)
        self._closing = False
        self.disposal: asyncio.Task[None] | None = None  # frees what was removed while it was in use
        self._awaited: dict[str, asyncio.TimerHandle] = {}  # of that, what clients may come back to
        for name in pool.state.deferred:
            self._await_clients(name)
        pool.unsynced.start(pool.journal.sequence + 1)
        if pool.has_leftovers and not is_device(pool.data.path):
            self.spawn(self._sweep())
        self._merge_soon()
        self.verifier.sum_soon()
        if not pool.journal.next_ready:
            self._prepare_soon()

    def open(self, name: str) -> LiveVolume:
        """The volume or snapshot `name`, one object for all. Raises NotFound."""
        volume = self.pool.volume(name)
        if volume.live is None:
            volume.live = LiveVolume(self, volume)
        return volume.live

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run I/O on the data file in a thread; blocks freed meanwhile are not reused before it ends."""
        return await self._entered(self._io, partial(function, *arguments))

    async def in_upkeep(self, function: Callable[[], T]) -> T:
        """The same in the one thread for what nobody waits for."""
        return await self._entered(self._upkeep, function)

    async def _entered(self, threads: Threads, function: Callable[[], T]) -> T:
        epoch = self.enter()
        try:
            return await threads.run(function)
        finally:
            self.leave(epoch)

    def enter(self) -> int:
        """A read that does not end in this turn begins: blocks freed from now on are not reused before `leave`."""
        return self.pool.enter()

    def leave(self, epoch: int) -> None:
        """The read for which `enter` returned `epoch` has ended."""
        self.pool.leave(epoch)
        self._reclaim_soon()
        left, self._next_leave = self._next_leave, self._loop.create_future()
        left.set_result(None)

    # -- commands

    async def execute(self, wanted: Sequence[Command]) -> None:
        """Make `wanted` so: all or nothing, one commit. Raises errors.Error; InUse names who holds what."""
        if any(isinstance(command, commands.Remove | commands.Rollback) for command in wanted):
            await self._let_merge()
        async with self._structure:
            async with AsyncExitStack() as gates:
                for name in sorted({name for command in wanted for name in _changed(command)}):
                    if name in self.pool.state.names:
                        await gates.enter_async_context(self.open(name).gated())
                # From here to the end of what is done, nobody can connect or go.
                wanted = [self._as_used(command) for command in wanted]
                self._refuse_used(wanted)
                removed = self._removed(wanted)
                before = set(self.pool.state.deferred)
                self.pool.execute(wanted)
                told = [*map(_freed, removed), *map(self._deferred, self.pool.state.deferred.keys() - before)]
        self.space_came()  # a quota, a reservation or the pool's size may have changed
        try:
            await self.commit()
        except GivenUp as error:
            raise NoSpace("the daemon stops, and finds no room in the journal: it is not done") from error
        for kind, message, facts in told:
            self.events.notify(kind, message, **facts)

    async def _let_merge(self) -> None:
        """What leaves a layer to be merged waits a moment where very many are: else they were made without end."""
        deadline = self._loop.time() + MERGE_WAIT
        with contextlib.suppress(GivenUp):
            while self.merging is not None and len(self.pool.state.mergeable) > MERGE_MOST:
                if not await self._merges.wait(deadline):
                    return

    def _as_used(self, command: Command) -> Command:
        """A removal is deferred where somebody uses the name, and only there."""
        if isinstance(command, commands.Remove) and command.deferred and not self.users(command.name):
            return replace(command, deferred=False)
        return command

    def _refuse_used(self, wanted: Sequence[Command]) -> None:
        for command in wanted:
            what, name = _needs_unused(command, self.pool.state.names)
            if what and (holders := self.users(name)):
                raise InUse(f"{name!r} is in use, it cannot be {what}: {', '.join(holders)}", holders)

    # -- what was removed while it was in use

    def _removed(self, wanted: Sequence[Command]) -> list[Row]:
        """Of it, what `wanted` is to free."""
        names = dict.fromkeys(command.name for command in wanted if isinstance(command, commands.Remove))
        return [self.pool.show(name) for name in names if name in self.pool.state.deferred]

    def _deferred(self, name: str) -> Told:
        former, holders = former_name(name), self.users(name)
        what = f"{former!r} is removed, and freed when those who use it have gone: {', '.join(holders)}"
        return events.DEFERRED, what, {"name": former, "called": name, "holders": holders}

    def let_go(self, name: str, may_return: bool) -> None:
        """One of those who used `name` has gone, perhaps to come back."""
        if is_deferred(name):
            if may_return:
                self._await_clients(name)
            self._free_removed_soon()

    def awaited(self, former: str) -> str | None:
        """What was removed as `former`, and is what a client means that comes back and asks for that.

        None where it may mean several: none must find another one's data.
        """
        there = self.pool.state.deferred
        found = [name for name in self._awaited if former_name(name) == former and name in there]
        return found[0] if len(found) == 1 else None

    def _await_clients(self, name: str) -> None:
        if (timer := self._awaited.get(name)) is not None:
            timer.cancel()
        self._awaited[name] = self._loop.call_later(COME_BACK, self._await_no_more, name)

    def _await_no_more(self, name: str) -> None:
        del self._awaited[name]
        self._free_removed_soon()

    def _unused(self) -> list[str]:
        """What is removed, and neither used nor waited for."""
        return [name for name in self.pool.state.deferred if name not in self._awaited and not self.users(name)]

    def _free_removed_soon(self) -> None:
        if self.disposal is None and not self._closing and self.pool.failed is None and self._unused():
            self.disposal = self.spawn(self._free_removed())

    async def _free_removed(self) -> None:
        try:
            while not self._closing and (names := self._unused()):
                with contextlib.suppress(InUse):  # by one who has come back
                    await self.execute([commands.Remove(name, if_exists=True) for name in names])
        except (PoolFailed, NoSpace):
            pass  # told where it happened
        finally:
            self.disposal = None

    # -- commit

    async def commit(self) -> None:
        """Return when all that was changed before is durable. Raises what `durable` does."""
        if (durable := self.durable()) is not None:
            await asyncio.shield(durable)

    def durable(self) -> asyncio.Future[None] | None:
        """Done when all that was changed before is durable; None: it is. One for all who ask before the same batch: it
        costs a request no task. Nobody may cancel it.

        Raises, here or in the future, PoolFailed; or NoSpace when the journal has found no room for as long as a write
        would wait for space: it is tried again and again all the same. GivenUp when the pool is closed meanwhile.
        """
        if self._committing is None:
            if not self.pool.has_changes:
                self.pool.check_writable()
                return None
            self._committing = self._loop.create_task(self._commit())
        if self._next_batch is None:
            self._next_batch = self._loop.create_future()
            self._next_since = self._loop.time()
        self._crowd.ask()
        return self._next_batch

    def publish(self) -> None:
        """To be called before replies leave: what they promise survives the end of this process."""
        if self.pool.unsynced.publish():
            self.spawn(self._commit_quietly())

    async def _commit(self) -> None:
        """Batch after batch, as long as someone waits."""
        await asyncio.sleep(0)  # whoever asks in this turn of the loop belongs to this batch
        while self._next_batch is not None:
            if self._crowd.missing >= MANY and self.flushes > FLUSHES and self._sync_took < QUICK_SYNC:
                self.pool.data.begin_sync()  # the disk is at it while the loop hears some of them
                await asyncio.sleep(0)
            elif self._sync_took > SLOW_SYNC:
                await self._crowd.gather(min(self._sync_took / 2, MOST_GATHERING))
            self._crowd.begin()
            durable = self._served = self._next_batch
            self._served_since, self._next_batch = self._next_since, None
            failure: Exception | None = None
            try:
                if self.pool.has_changes:
                    await self._commit_batch()
                else:
                    self.pool.check_writable()
            except (PoolFailed, GivenUp) as error:
                failure = error
            except Exception as error:  # a defect of ours: whoever waits must not wait for ever
                log.exception("a commit failed")
                self._fail(OSError(errno.EIO, str(error)))
                failure = PoolFailed(f"the pool is read-only: {self.pool.failed}")
            self._crowd.end()
            if not durable.done():
                _settle(durable, failure)
        self._served = None
        self._committing = None
        self._reclaim_soon()

    def _fail(self, error: OSError) -> None:
        first = self.pool.failed is None
        self.pool.fail(error)
        self.space_came()  # and will not: who waits is told
        if first and self.pool.failed is not None:
            self.events.notify(events.FAILED, f"the pool is read-only: {self.pool.failed}")

    async def _sync_batch(self, batch: Batch) -> None:
        """Raises PoolFailed, or GivenUp where there is no room for the batch and nobody waits any more."""
        began: float | None = None
        while True:
            try:
                return await self._sync.run(partial(self._time_sync, batch))
            except NoSpace as error:
                self.pool.note_journal()
                self._watch()
                began = self._loop.time() if began is None else began
                self._refuse_waiters(began, error)
            except OSError as error:
                self._fail(error)
                raise PoolFailed(f"the pool is read-only: {self.pool.failed}") from error
            await self._room.wait(self._loop.time() + POLL)  # not in the handler: as in LiveVolume._holding

    def _refuse_waiters(self, began: float, error: NoSpace) -> None:
        """Tell those who have waited long enough for a commit that has found no room since `began`."""
        long_ago = self._loop.time() - self._patience(None)
        refusal = NoSpace(f"not durable yet: {error}")
        if self._served is not None and not self._served.done() and max(began, self._served_since) <= long_ago:
            _settle(self._served, refusal)
        if self._next_batch is not None and max(began, self._next_since) <= long_ago:
            _settle(self._next_batch, refusal)
            self._next_batch = None

    async def _commit_batch(self) -> None:
        self.pool.check_writable()
        if self.flushes > FLUSHES and self._commit_here():
            return
        batch = self.pool.unwritten or self.pool.begin()
        await self._sync_batch(batch)
        self._finish(batch)

    def commit_now(self) -> bool:
        """Commit overwrites in place in the loop itself, where that is short; False: ask `durable`.

        For a client that is alone. Raises PoolFailed.
        """
        return self._committing is None and self._commit_here()

    def _commit_here(self) -> bool:
        """Whether it was short. Raises PoolFailed.

        Handing over to the thread and back costs as much as the sync of a quick disk. A disk that is quick no longer
        holds up the loop once: then the thread is asked until it is quick again.
        """
        if self._sync_took >= QUICK_SYNC or not 0 < self.pool.overwritten <= LITTLE:
            return False
        if self.pool.unwritten is not None:  # given up for want of room
            return False
        batch = self.pool.begin()
        try:
            self._time_sync(batch)
        except NoSpace:
            return False  # the batch is the pool's to write: `durable` tries again
        except Exception as error:  # also a defect of ours: what the batch took is not durable
            self._fail(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
            raise PoolFailed(f"the pool is read-only: {self.pool.failed}") from error
        self._finish(batch)
        return True

    def _time_sync(self, batch: Batch) -> None:
        begun = time.monotonic()
        batch.sync()
        self._sync_took = time.monotonic() - begun

    def _finish(self, batch: Batch) -> None:
        self.pool.finish(batch)
        self.commits += 1
        if self.pool.allocator.used != self._watched:
            self._watch()
        self._merge_soon()  # what the batch left without a name may be merged now
        self.verifier.sum_soon()
        if batch.checkpoint_due:
            self.spawn(self._checkpoint(batch))
        elif not self.pool.journal.next_ready and not self._closing:
            self._prepare_soon(now=self.pool.journal.may_fit)

    def _prepare_soon(self, *, now: bool = False) -> None:
        """Have room for the next journal segment while there is room: removing things must work on a full disk."""
        if self._preparing is None and (now or self._loop.time() >= self._prepare_at):
            self._preparing = self.spawn(self._prepare())

    async def _prepare(self) -> None:
        try:
            await self._upkeep.run(self.pool.journal.prepare_next)
        except OSError as error:
            if error.errno not in FULL_DISK:
                log.warning("the next journal segment cannot be prepared: %s", os.strerror(error.errno or 0))
            self._prepare_at = self._loop.time() + PREPARE_AGAIN
        self._preparing = None
        self.pool.note_journal()
        self._watch()
        if not self.pool.journal.starved:
            self.space_came()

    async def _checkpoint(self, batch: Batch) -> None:
        try:
            await self._upkeep.run(partial(batch.write_checkpoint, partial(self._give_way, CHECKPOINT_PAUSE)))
        except OSError as error:
            log.warning("no checkpoint could be written (%s): the journal grows", os.strerror(error.errno or 0))
            self.pool.checkpoint_ended(error)
        else:
            self.pool.checkpoint_ended(None)
        self.pool.note_journal()

    def _give_way(self, seconds: float) -> None:
        """In the upkeep thread: let others have the GIL, and the processor, unless someone waits for what it does."""
        if not self._closing and not self._space_short:
            time.sleep(seconds)

    def _tick(self) -> None:
        if self.pool.has_changes and self.pool.failed is None:
            self.spawn(self._commit_quietly())
        starved = self.pool.journal.starved
        if starved:
            self._prepare_soon(now=self.pool.journal.may_fit)
        self.pool.arm_growth()
        self._watch()
        self._free_removed_soon()  # what could not be when it was let go; what a batch has hidden that nobody used
        self.lenders.drop()
        # Small frames where the journal is short: one that is larger than what is left keeps all behind it waiting.
        self._timer = self._loop.call_later(POLL if starved else COMMIT_INTERVAL, self._tick)

    async def _commit_quietly(self) -> None:
        try:
            await self.commit()
        except (PoolFailed, NoSpace, GivenUp):
            pass  # told where it happened; who asks is told

    # -- waiting for space

    async def wait_for_space(self, name: str, error: NoSpace, deadline: float | None) -> float:
        """A write to volume `name` met `error`, and holds nothing: return when it is worth another try.

        `deadline` is None the first time and what this returned before, later. Raises `error` where waiting is of no
        use, not wanted, or was long enough; GivenUp when the pool is being closed.
        """
        first = deadline is None
        if deadline is None:
            deadline = self._loop.time() + self._patience(name)
        if isinstance(error, OverQuota):
            self._tell_over_quota(name, error)
            raise error
        waits = self._loop.time() < deadline
        # Space is coming, whatever the policy says; on a full disk perhaps not enough: then not for ever.
        if self.pool.allocator.pending > self.lenders.held and (first or waits or not isinstance(error, DiskFull)):
            await self._freed_space()
            return deadline
        self._tell_no_space(name, error, waits)
        if isinstance(error, DiskFull) or self.pool.journal_low:
            self._space.wake_in(POLL)
        if self.pool.journal_low:
            self._prepare_soon(now=self.pool.journal.may_fit)
        if not waits or not await self._space.wait(deadline):
            raise error
        return deadline

    @property
    def waiting(self) -> int:
        """Writes that wait for space."""
        return self._space.count

    def space_came(self) -> None:
        """Whoever waits for space, tries again."""
        self._space.wake()
        self._room.wake()

    def blocks_freed(self) -> None:
        """Somebody may have given blocks up: who waits for some does not wait for the timer's commit, too."""
        if self._space.count and self._freeing is None and self.pool.allocator.pending:
            self._freeing = self.spawn(self._free_quietly())

    async def _free_quietly(self) -> None:
        await self._commit_quietly()
        self._freeing = None

    def _patience(self, name: str | None) -> float:
        """Seconds that a write to `name` waits for space; None for what has no name."""
        policy = self.pool.policy
        wanted = self.no_space(name) if name is not None else None
        return policy.no_space_timeout if (wanted or policy.no_space) == QUEUE else 0.0

    async def _freed_space(self) -> None:
        """Return when some of the blocks that were freed may have come free."""
        await self.commit()
        if (reclaiming := self._reclaim_soon()) is not None:
            await asyncio.shield(reclaiming)
        elif self.pool.has_freed:  # durable, and held back by a read under way
            await asyncio.shield(self._next_leave)

    def stop(self) -> None:
        """Nothing waits for space any more, and nobody hears of events."""
        self._space.close()
        self._room.close()
        self._merges.close()
        self.events.close()

    # -- events

    def listen(self) -> Listener:
        """What happens from now on; first, how things are."""
        listener = self.events.listen()
        usage = self.pool.usage()
        what = f"{usage.fraction:.0%} of the pool are in use: {format_size(usage.free)} free"
        listener.put(Event(events.LISTENING, what, time.time(), {"used": usage.used, "free": usage.free}))
        return listener

    def _watch(self) -> None:
        """Tell what usage has come to mean since the last look."""
        pool = self.pool
        try:
            usage = pool.usage()
        except OSError as error:  # of the file system below: nothing that a commit depends on
            log.warning("how full the pool is cannot be told: %s", error)
            return
        self._watched = pool.allocator.used
        if passed := self._levels.update(usage.fraction):
            kind, level = passed
            which = "more" if kind == events.LOW_WATER else "less"
            what = f"{which} than {level:.0%} of the pool are in use: {format_size(usage.free)} free"
            percent = round(level * 100, 3)
            self.events.notify(kind, what, level=percent, used=usage.used, free=usage.free)
        if self._free_when_full is not None and not self._space.count:
            if usage.free > self._free_when_full + usage.total * events.HYSTERESIS:
                self._free_when_full = None
                self.events.notify(events.SPACE, f"there is space again: {format_size(usage.free)}", free=usage.free)
        for name in list(self._over_quota):
            if not self._is_over_quota(name):
                self._over_quota.discard(name)
        if self._starved != pool.journal.starved:
            self._starved = pool.journal.starved
            kind = events.JOURNAL_LOW if self._starved else events.JOURNAL_ROOM
            what = "no room for the next journal segment" if self._starved else "the journal has room again"
            self.events.notify(kind, what, room=pool.journal.room)

    def _tell_no_space(self, name: str, error: NoSpace, waits: bool) -> None:
        free = self.pool.usage().free
        if self._free_when_full is not None:  # one met a limit, and this one less: it is that much that must come
            self._free_when_full = min(self._free_when_full, free)
        else:
            self._free_when_full = free
            what = "waits" if waits else "is refused"
            self.events.notify(events.NO_SPACE, f"a write to {name!r} {what}: {error}", name=name, waits=waits)

    def _tell_over_quota(self, name: str, error: OverQuota) -> None:
        if name not in self._over_quota:
            self._over_quota.add(name)
            self.events.notify(events.NO_SPACE, f"a write to {name!r} is refused: {error}", name=name, waits=False)

    def _is_over_quota(self, name: str) -> bool:
        row = self.pool.state.names.get(name)
        try:
            if row is not None:
                self.pool.limits.left(row.layer)
        except OverQuota:
            return True
        return False

    # -- freed space

    @property
    def _space_short(self) -> bool:
        """Upkeep goes on without pauses: it is space that matters now."""
        space = self.pool.allocator
        return (space.free - space.pending) * SHORT < space.capacity

    def _reclaim_soon(self) -> asyncio.Task[None] | None:
        if self._reclaiming is None and self.pool.can_reclaim:
            self._reclaiming = self.spawn(self._reclaim())
        return self._reclaiming

    async def _reclaim(self) -> None:
        await asyncio.sleep(0)  # who waited for the commit is answered first: starting the thread may take milliseconds
        while (blocks := self.pool.take_reclaimable()) is not None:
            none_held = not self.lenders.held
            if len(blocks := self.lenders.without_lent(blocks)):
                await self._upkeep.run(partial(self.pool.punch, blocks, partial(self._give_way, PUNCH_PAUSE)))
                self.pool.allocator.release(blocks)
                self.space_came()
            if none_held and self.lenders.held:
                self._loop.call_later(LENT_AGAIN, self._try_held)
        self._reclaiming = None
        self.lenders.drop()
        if self.pool.journal.starved:
            self._prepare_soon(now=self.pool.journal.may_fit)
        if self.pool.allocator.used != self._watched or self._free_when_full is not None:
            self._watch()

    def _try_held(self) -> None:
        if not self._closing:
            self.pool.reclaim_again(self.lenders.take_held())
            self._reclaim_soon()

    async def _sweep(self) -> None:
        """Give back what a crash left in free blocks: of writes that no commit followed, of frees that none punched."""
        position = 0
        while not self._closing and (found := await self._next_data(position)) is not None:
            start, end = found
            position = min(end, start + SWEEP)
            self.pool.sweep(start, position)
            while self.pool.has_freed and not self._closing:  # else all that is free would be out of reach before long
                if (reclaiming := self._reclaim_soon()) is not None:
                    await asyncio.shield(reclaiming)
                else:
                    await asyncio.shield(self._next_leave)

    async def _next_data(self, position: int) -> tuple[int, int] | None:
        return await self._upkeep.run(partial(self.pool.data.next_data, position))

    # -- merging

    def _merge_soon(self) -> None:
        if self.merging is None and not self._closing and self.pool.next_unnamed(self._unmergeable) is not None:
            self.merging = self.spawn(self._merge())

    async def _merge(self) -> None:
        try:
            while (parent := self.pool.next_unnamed(self._unmergeable)) is not None and not self._closing:
                try:
                    await self._prune_layer(parent)
                    await self._merge_layer(parent)
                except OSError as error:
                    if error.errno in FULL_DISK:
                        return  # after the next commit it is tried again
                    log.warning("layer %d could not be merged: %s", parent.number, error)
                    self._unmergeable.add(parent.number)
                if not self._merging_behind or self._space_short:
                    await self._commit_merged()
            await self._commit_merged()
        except (PoolFailed, NoSpace, GivenUp):
            pass
        finally:
            self.merging = None
            self._merges.wake()
            self.pool.sums.moves_ended()
            self.verifier.sum_soon()

    @property
    def _merging_behind(self) -> bool:
        """Snapshots come and go faster than they are merged: chains, memory and space would grow without end."""
        return len(self.pool.state.mergeable) + len(self.pool.state.prunable) > MERGE_BEHIND

    async def _commit_merged(self) -> None:
        """What merging freed can be used again."""
        self._merged_leaves = 0
        await self.commit()

    async def _pause_merge(self, begun: float, leaves: int = 1, turned: bool = False) -> None:
        """After a step that began at `begun`, by time.monotonic: the loop's own clock has steps of 1 ms.

        `turned`: the loop has turned meanwhile.
        """
        took = time.monotonic() - begun
        self._merged_leaves += leaves
        if self._merged_leaves >= MERGE_COMMIT:
            await self._commit_merged()
        if not (self._merging_behind or self._space_short):
            await asyncio.sleep(min(MERGE_PAUSES * took, MERGE_PAUSE))
        elif not turned:
            await asyncio.sleep(0)

    async def _prune_layer(self, layer: Layer) -> None:
        if layer.number in self.pool.state.prunable:
            begun = time.monotonic()
            for _ in merge.prune(self.pool, layer):
                await self._pause_merge(begun)
                begun = time.monotonic()
                if self._closing:
                    return
            self._merges.wake()

    async def _merge_layer(self, parent: Layer) -> None:
        while (child := merge.child_of(self.pool, parent)) is not None and not self._closing:
            begun = time.monotonic()
            leaves = merge.next_leaves(parent, merge.LEAVES if self._merging_behind else 1)
            if not leaves:
                merge.unlink(self.pool, parent, child)
                self._merges.wake()
                return
            step = await self._merge_leaves(parent, child, leaves)
            if step is not None:
                await self._pause_merge(begun, len(step.leaves), step.has_io)

    async def _merge_leaves(self, parent: Layer, child: Layer, leaves: list[int]) -> merge.Step | None:
        """None: meanwhile `child` has become another's."""
        async with AsyncExitStack() as held:
            if child.head:
                assert child.name is not None
                await held.enter_async_context(self.open(child.name).hold_leaves(leaves))
                if merge.child_of(self.pool, parent) is not child:
                    return None
            step = merge.Step(self.pool, parent, child, leaves)
            if step.has_io:
                await self.in_thread(step.copy)
                if merge.child_of(self.pool, parent) is not child:
                    return None
            step.finish()
            return step

    # -- the end

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Work that `close` waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", exc_info=error)

    async def close(self) -> None:
        """Make everything durable, end what runs in the background, close the pool. Raises PoolFailed."""
        self._closing = True
        self.verifier.stop()
        self._timer.cancel()
        for timer in self._awaited.values():
            timer.cancel()
        self.stop()
        failure: BaseException | None = None  # not `finally`, which waits below: as in LiveVolume._holding
        try:
            if self.pool.failed is None:
                await self.commit()
        except (GivenUp, NoSpace):
            pass  # the pool tries once more
        except BaseException as error:
            failure = error
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        self.readers.close()
        for threads in (self._sync, self._io, self._upkeep):
            threads.end()
        self.lenders.close()
        try:
            self.pool.close()
        except NoSpace as error:
            log.error("what nobody was told is durable may be lost: %s", error)
        if failure is not None:
            raise failure


def _settle(durable: asyncio.Future[None], failure: Exception | None) -> None:
    if failure is None:
        durable.set_result(None)
    else:
        durable.set_exception(failure)
        durable.exception()  # whoever waited may be gone


def _freed(row: Row) -> Told:
    former = former_name(row.name)
    what = f"{former!r}, removed while it was in use, is freed: {format_size(row.exclusive)}"
    return events.FREED, what, {"name": former, "called": row.name, "freed": row.exclusive}


def _changed(command: Command) -> tuple[str, ...]:
    """The existing volumes whose content or end `command` changes, or seals."""
    match command:
        case commands.Snapshot():
            return (command.volume,)
        case commands.Rollback():
            return (command.volume,)
        case commands.Remove() | commands.Resize():
            return (command.name,)
        case commands.Rename():
            return (command.old,)
        case _:
            return ()


def _needs_unused(command: Command, names: Mapping[str, Name]) -> tuple[str, str]:
    """What `command` would do to a name that connections must not hold; ("", "") where they do not matter.

    A client that does not know of a larger size does no harm: bounds follow the volume, not what a client was told.
    """
    match command:
        case commands.Remove(deferred=False):
            return "removed", command.name
        case commands.Rollback():
            return "rolled back", command.volume
        case commands.Resize() if command.name in names and command.size < names[command.name].size:
            return "made smaller", command.name
        case commands.Rename():
            return "renamed", command.old
        case _:
            return "", ""

"""Work through LivePool: an event loop and its threads, writers at once, commands, merges, checkpoints beside them.

What is answered to whom is in the same log as what the engine did to its files, so a cut at any event has its bounds.
The order of events is the threads' own: a seed gives the same work, not the same run. Each writer has a part of a
volume to itself, as a client that wants to know what it reads.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvloop

from nbdthin.errors import NoSpace, PoolFailed
from nbdthin.pool import live as live_module
from nbdthin.pool import livevolume as volume_module
from nbdthin.pool.commands import Clone, Command, Create, Label, Remove, Rename, Resize, Rollback, Snapshot
from nbdthin.pool.live import LivePool
from nbdthin.pool.livevolume import LiveVolume
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import is_deferred
from simulatelib.disk import KEPT, LOST, MIXED, Tree, materialise
from simulatelib.judge import Judge
from simulatelib.oracle import Frozen, Head, Image, Oracle
from simulatelib.record import Recorder
from simulatelib.run import BLOCK, Counts, Failure, abandon, judge_log, scratch, small, start
from simulatelib.watched import WatchedPool

SUB = BLOCK // 16
WRITERS = 4  # for each volume
REGION = 18 * SUB + 100  # bytes: neighbours share a subblock and a block
SIZE = WRITERS * REGION // 512 * 512 + 512
VOLUMES = ("a", "b")
KINDS = (
    *("snapshot", "snapshot", "clone", "remove", "remove", "defer"),
    *("rename", "resize", "label", "more"),
)
CUTS = 60  # of one life
LIFE = 30  # commands between two cuts that the run goes on from


class LiveWork:
    """`steps` commands, and writers beside them for as long. `errors` are those that requests and commands met."""

    def __init__(self, seed: int, recorder: Recorder, pool: WatchedPool, steps: int) -> None:
        self.errors: list[OSError] = []
        self._chance = random.Random(seed)
        self._recorder = recorder
        self._pool = self.pool = pool
        assert pool.oracle is not None
        self._oracle: Oracle = pool.oracle
        self._steps = steps
        self._count = 0
        self._running = True

    async def run(self, at_end: Callable[[LivePool], Awaitable[None]] | None = None) -> None:
        """The pool crashes at the end; with `at_end`, that is called, and then the pool is closed."""
        live = self._live = LivePool(self._pool)
        try:
            await self._work(at_end)
        finally:
            if self._pool.failed is None and at_end is None:
                self._pool.fail(OSError(5, "the power is gone"))
            await live.close()

    async def _work(self, at_end: Callable[[LivePool], Awaitable[None]] | None) -> None:
        await self._freed()
        await self._attempt(self._create(*(name for name in VOLUMES if name not in self._oracle.images)))
        async with self._connected(), asyncio.TaskGroup() as group:
            for name in VOLUMES:
                for index in range(WRITERS):
                    group.create_task(self._writer(name, index, random.Random(self._chance.random())))
            group.create_task(self._commander())
        while self._live.merging is not None:
            await self._live.merging
        await self._check_all()
        if at_end is not None:
            await at_end(self._live)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        """Where the writers are clients of a server, that is there inside."""
        yield

    async def _create(self, *names: str) -> None:
        if names:
            await self._execute(*(Create(name, SIZE) for name in names))

    # -- clients

    async def _flush(self) -> None:
        moment = self._oracle.ask_flush()
        await self._live.commit()
        self._oracle.flushed(moment)

    async def _writer(self, name: str, index: int, chance: random.Random) -> None:
        """One client: what it writes, and no one else, is what it reads."""
        while self._running:
            await self._attempt(self._request(name, index * REGION, chance))
            await asyncio.sleep(0)

    async def _attempt(self, work: Coroutine[object, object, None]) -> None:
        """The errors that a client may meet: each is its own, but that of a failed pool."""
        try:
            await work
        except NoSpace:
            pass
        except PoolFailed:
            self._running = False
        except OSError as error:
            self.errors.append(error)

    async def _request(self, name: str, base: int, chance: random.Random) -> None:
        start = chance.randrange(REGION)
        length = min(chance.choice((1, 512, SUB, 3 * SUB, 5000, 9 * SUB)), REGION - start)
        kind = chance.random()
        if kind < 0.6:
            await self._write(name, base + start, chance.randbytes(length))
        elif kind < 0.7:
            await self._zero(name, base + start, length, chance.random() < 0.3)
        elif kind < 0.8:
            await self._read(name, base, REGION)
        else:
            await self._flush()
        if chance.random() < 0.05:  # FUA
            await self._write(name, base + start, chance.randbytes(length))
            await self._flush()

    async def _write(self, name: str, offset: int, data: bytes) -> None:
        volume = self._live.open(name)
        with self._change(name, offset, data):
            if not (volume.write_small(offset, memoryview(data)) or volume.write_now(offset, memoryview(data))):
                await volume.write(offset, memoryview(data))

    async def _zero(self, name: str, offset: int, length: int, allocate: bool) -> None:
        volume = self._live.open(name)
        with self._change(name, offset, bytes(length)):
            if allocate or not volume.zero_now(offset, length):
                await volume.write_zeroes(offset, length, allocate)

    @contextmanager
    def _change(self, name: str, offset: int, data: bytes) -> Iterator[None]:
        change = self._oracle.begin_change(name, offset, data)
        try:
            yield
        except NoSpace:
            self._oracle.drop_change(change)
            raise
        except (OSError, PoolFailed):  # of a large one, a part may be done
            self._oracle.fail_change(change)
            raise
        self._oracle.end_change(name, change)

    async def _read(self, name: str, offset: int, length: int) -> None:
        """A read of what nobody writes meanwhile."""
        volume = self._live.open(name)
        view = memoryview(bytearray(length))
        segments = volume.volume.segments(offset, length)
        if self._chance.random() < 0.3 or not volume.read_now(segments, view):
            await _read_slowly(volume, segments, view)
        image = self._oracle.images[name]
        kept, whole = image.kept, bytearray(image.content())
        whole[offset : offset + length] = view
        self._oracle.check_now(name, bytes(whole), [change for head, change in self._oracle.active() if head is kept])

    # -- commands

    async def _execute(self, *wanted: Command) -> None:
        """Durable when it returns."""
        await self._live.execute(wanted)
        self._recorder.note(f"answered: {', '.join(map(str, wanted))}")
        self._oracle.answered()

    def _kept(self, kind: type[Frozen] | type[Head]) -> list[str]:
        return [name for name in self._names() if isinstance(self._oracle.images[name].kept, kind)]

    def _names(self) -> list[str]:
        """Of what is there, and not removed while it was in use."""
        return [name for name in self._oracle.images if not is_deferred(name)]

    def _name(self) -> str:
        while f"n{self._count}" in self._oracle.images:
            self._count += 1
        return f"n{self._count}"

    async def _commander(self) -> None:
        try:
            for step in range(self._steps):
                if not self._running:
                    break
                await self._attempt(self._command())
                if step % 10 == 9:
                    self._pool.want_checkpoint = True
                await asyncio.sleep(0.001 * self._chance.random())
        finally:
            self._running = False

    async def _command(self) -> None:
        chance = self._chance
        snapshots = self._kept(Frozen)
        others = [name for name in self._names() if name not in VOLUMES]
        heads = [name for name in self._kept(Head) if name not in VOLUMES]
        kind = chance.choice(KINDS)
        if len(others) > 5:
            kind = "remove"
        if kind == "snapshot" or not snapshots:
            await self._snapshot(chance.choice([*VOLUMES, *heads]))
        elif kind == "clone":
            name = self._name()
            await self._execute(Clone(chance.choice(snapshots), name))
            await self._write(name, chance.randrange(SIZE - SUB), chance.randbytes(SUB))
        elif kind == "remove" and others:
            await self._execute(Remove(chance.choice(others)))
        elif kind == "defer" and others:
            await self._remove_used(chance.choice(others))
        elif kind == "rename" and others:
            await self._execute(Rename(chance.choice(others), self._name()))
        elif kind == "resize" and heads:
            await self._execute(Resize(chance.choice(heads), SIZE + 512 * chance.choice((-1, -3, 0, 5))))
        elif kind == "label":
            await self._execute(Label(chance.choice(self._names()), {"at": str(len(self._recorder.log))}))
        elif heads:
            await self._execute(Rollback(chance.choice(heads), chance.choice(snapshots)))

    async def _snapshot(self, volume: str) -> None:
        name = self._name()
        await self._execute(Snapshot(volume, name))
        image = self._oracle.images[name]
        found = await self._read_all(name, image)
        self._oracle.settle(name, found)

    async def _remove_used(self, name: str) -> None:
        """Somebody uses `name` when it is removed, and for a while longer."""
        used, others = self._live.open(name), self._live.users
        self._live.users = lambda asked: ("somebody",) if asked == used.volume.name else others(asked)
        try:
            await self._execute(Remove(name, deferred=True))
            hidden = used.volume.name
            if isinstance(self._oracle.images[hidden].kept, Head):
                offset = self._chance.randrange(self._oracle.images[hidden].size - SUB)
                await self._write(hidden, offset, self._chance.randbytes(SUB))
                if self._chance.random() < 0.5:
                    await self._flush()
        finally:
            self._live.users = others
        self._live.let_go(hidden, may_return=False)
        await self._freed()

    async def _freed(self) -> None:
        """What else is executed is so before the next command, whose answer then speaks of it, too."""
        while self._live.disposal is not None:
            await self._live.disposal

    async def _read_all(self, name: str, image: Image) -> bytes:
        volume = self._live.open(name)
        view = memoryview(bytearray(image.size))
        await _read_slowly(volume, volume.volume.segments(0, image.size), view)
        return bytes(view)

    async def _check_all(self) -> None:
        for name, image in self._oracle.images.items():
            found = await self._read_all(name, image)
            kept = image.kept
            if isinstance(kept, Frozen):
                self._oracle.check_now(name, found, kept.under_way)
            else:
                self._oracle.check_now(name, found, [change for head, change in self._oracle.active() if head is kept])


async def _read_slowly(volume: LiveVolume, segments: list[tuple[int, int]], view: memoryview) -> None:
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    volume.read(segments, view, ended.set_result, ask=True)
    assert await ended is None


def run_live(seed: int, steps: int, work: type[LiveWork] = LiveWork) -> Counts:
    """Commands of number `steps` beside writers; the power is cut at random events of it. Raises Failure."""
    counts = Counts(steps=steps)
    chance = random.Random(seed)
    constants = (
        (volume_module, "INLINE_WRITE", 2 * SUB),
        (live_module, "COMMIT_INTERVAL", 0.01),
        (live_module, "MERGE_COMMIT", 2),
    )
    with small(*constants), scratch() as directory:
        judge = Judge(directory, random.Random(seed + 1))
        tree: Tree | None = None
        try:
            for life in range(-(-steps // LIFE)):
                root = directory / f"life{life}"
                root.mkdir()
                if tree is None:
                    Pool.init(root / "pool", size=72 * BLOCK, block_size=BLOCK)
                else:
                    materialise(tree, root)
                tree = _live(root, chance, judge, min(LIFE, steps - life * LIFE), counts, work) or tree
                shutil.rmtree(root)
        except Exception as error:
            raise Failure(error, f"tools/simulate --live --seed {seed} --steps {steps}") from error
    counts.images = judge.images
    return counts


def _live(
    root: Path, chance: random.Random, judge: Judge, steps: int, counts: Counts, kind: type[LiveWork]
) -> Tree | None:
    recorder = Recorder(root)
    recorder.slow = lambda: time.sleep(0.002 * random.random())  # threads: it draws nothing from `chance`
    pool = start(recorder, root / "pool", exact=False)
    first = len(recorder.log)
    work = kind(chance.randrange(1 << 30), recorder, pool, steps)
    try:
        uvloop.run(work.run())
    except ExceptionGroup as group:
        raise _first(group) from None
    finally:
        if pool.failed is None:
            abandon(pool)
    last = len(recorder.log)
    counts.events += last - first
    moments = sorted(chance.sample(range(first, last + 1), min(CUTS, last - first)))
    done, tree = judge_log(recorder, work._oracle, judge, moments, chance, (LOST, KEPT, MIXED, MIXED))
    counts.cuts += done
    return tree


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

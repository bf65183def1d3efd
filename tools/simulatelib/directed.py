"""Short histories, one for each thing that a pool does to its metadata, for the power to be cut at every event of them.

All begin with the same pool: volume `web`, two blocks written but for a gap in the second; snapshot `web@1`; `web`
written in part since; `fork`, a clone of the snapshot, written in part too. Block 0 of `web` holds more than what the
snapshot shows through it; block 1 less, and where the snapshot has nothing: so a merge of the two copies both ways.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nbdthin.errors import Error, NotFound
from nbdthin.pool.commands import Clone, Create, Label, Remove, Rename, Resize, Rollback, Snapshot
from nbdthin.pool.journal import HEADER
from nbdthin.pool.pool import Pool
from nbdthin.pool.superblock import read_superblock
from simulatelib.disk import KEPT, LOST, MIXED, Disk, Policy, materialise
from simulatelib.judge import Judge
from simulatelib.oracle import Lost
from simulatelib.record import Recorder, SyncFails
from simulatelib.run import BLOCK, Counts, Cuts, Failure, abandon, judge_log, scratch, small, start
from simulatelib.watched import FIXED
from simulatelib.work import Work

SUB = BLOCK // 16
POLICIES = (LOST, KEPT, MIXED, MIXED, MIXED)


def _prepare(work: Work) -> None:
    work.execute(Create("web", 3 * BLOCK + 512))
    work.write_at("web", 0, BLOCK + 4 * SUB)
    work.write_at("web", BLOCK + 6 * SUB, 10 * SUB)
    work.write_at("web", 2 * BLOCK, SUB)
    work.commit()
    work.execute(Snapshot("web", "web@1"))
    work.write_at("web", 0, 12 * SUB)
    work.write_at("web", BLOCK + 4 * SUB, 2 * SUB)
    work.execute(Clone("web@1", "fork"))
    work.write_at("fork", BLOCK, 3 * SUB)
    work.commit()
    work.upkeep()


def snapshot(work: Work) -> None:
    work.write_at("web", SUB, 3 * SUB)
    work.execute(Snapshot("web", "web@2"))
    work.write_at("web", SUB, SUB)
    work.commit()
    work.write_at("web", SUB, SUB)
    work.commit()


def clone(work: Work) -> None:
    work.execute(Clone("web@1", "c"), Clone("web@1", "d", 5 * BLOCK))
    work.write_at("c", 0, SUB)
    work.commit()
    work.write_at("c", 100, 512)
    work.write_at("d", 4 * BLOCK, BLOCK)
    work.commit()


def rollback(work: Work) -> None:
    work.execute(Rollback("web", "web@1"))
    work.write_at("web", BLOCK, BLOCK + SUB)
    work.commit()
    work.upkeep()
    work.write_at("web", 0, 2 * BLOCK)
    work.commit()


def rename_and_label(work: Work) -> None:
    work.execute(Rename("web@1", "golden"), Label("golden", {"a": "b"}))
    work.commit()
    work.execute(Label("golden", {"a": None}), Rename("web", "web@1"))
    work.write_at("web@1", 0, BLOCK)
    work.commit()


def delete(work: Work) -> None:
    work.execute(Remove("fork"))
    work.write_at("web", 0, BLOCK + SUB)
    work.commit()
    work.upkeep()
    work.write_at("web", 2 * BLOCK, SUB)  # may take what was freed
    work.execute(Create("new", 2 * BLOCK))
    work.write_at("new", 0, 2 * BLOCK)
    work.commit()
    work.execute(Remove("web"), Remove("web@1"))
    work.commit()
    work.upkeep()
    work.execute(Create("other", 4 * BLOCK))
    work.write_at("other", 0, 4 * BLOCK)
    work.commit()


def deferred(work: Work) -> None:
    """Removed while they are in use, a volume and the snapshot below it: written to, their names used again, freed."""
    hidden = [f"{name}~{work.pool.state.names[name].layer}" for name in ("web", "web@1")]
    work.execute(Remove("web", deferred=True), Create("web", 2 * BLOCK))
    work.write_at(hidden[0], 0, BLOCK + SUB)
    work.write_at("web", 0, SUB)
    work.commit()
    work.execute(Remove("web@1", deferred=True))
    work.write_at(hidden[0], BLOCK, 100)
    work.commit()
    work.execute(Remove(hidden[0]))
    work.commit()
    work.upkeep()
    work.write_at("web", 0, 2 * BLOCK)  # may take what was freed
    work.execute(Remove(hidden[1]), Snapshot("web", "web@1"))
    work.commit()
    _merge(work, lambda: work.write_at("fork", BLOCK, SUB))
    work.execute(Create("new", 4 * BLOCK))
    work.write_at("new", 0, 4 * BLOCK)
    work.commit()


def _merge(work: Work, write: Callable[[], object]) -> None:
    while work.pool.next_unnamed() is not None:
        work.merge()
        write()
        work.commit()
        work.upkeep()


def merge_with_copies(work: Work) -> None:
    work.execute(Remove("fork"))
    work.commit()
    work.execute(Remove("web@1"))
    work.write_at("web", 2 * BLOCK, SUB)
    work.merge()  # not yet: it is not settled
    work.write_at("web", BLOCK, SUB)
    work.commit()
    _merge(work, lambda: work.write_at("web", BLOCK, SUB))
    work.execute(Create("new", 4 * BLOCK))
    work.write_at("new", 0, 4 * BLOCK)
    work.commit()


def merge_and_nothing_else(work: Work) -> None:
    """What is synced is synced for the merge's sake."""
    work.execute(Remove("fork"), Remove("web@1"))
    work.commit()
    _merge(work, lambda: None)


def merge_into_a_snapshot(work: Work) -> None:
    work.execute(Snapshot("web", "web@2"), Remove("fork"))
    work.commit()
    work.execute(Remove("web@1"))
    work.commit()
    _merge(work, lambda: work.write_at("web", 0, BLOCK))


def prune(work: Work) -> None:
    work.write_at("web", 0, BLOCK)
    work.write_at("fork", 0, BLOCK)
    work.execute(Remove("web@1"))
    work.commit()
    work.merge()
    work.write_at("web", 2 * BLOCK, SUB)
    work.merge()
    work.merge()
    work.commit()
    work.upkeep()
    work.execute(Create("new", 3 * BLOCK))
    work.write_at("new", 0, 3 * BLOCK)
    work.commit()


def resize(work: Work) -> None:
    work.execute(Resize("web", BLOCK + 4 * SUB + 512))  # cuts a subblock of its own, beside others
    work.commit()
    work.execute(Resize("fork", SUB + 512))  # cuts one of the snapshot's
    work.write_at("web", BLOCK + 4 * SUB, 512)
    work.commit()
    work.upkeep()
    work.execute(Resize("web", 3 * BLOCK))
    work.write_at("web", 2 * BLOCK, BLOCK)
    work.commit()
    work.execute(Resize("web", 2 * BLOCK + 512), Create("new", BLOCK))
    work.write_at("new", 0, BLOCK)
    work.commit()


def trim(work: Work) -> None:
    work.trim_at("web", 0, BLOCK)
    work.commit()
    work.upkeep()
    work.trim_at("web", BLOCK, 5 * SUB)
    work.write_at("web", BLOCK + 4 * SUB + 10, 100)
    work.commit()
    work.execute(Create("new", BLOCK))
    work.write_at("new", 0, BLOCK)
    work.commit()


def checkpoint(work: Work) -> None:
    work.checkpoint()
    work.upkeep()
    work.write_at("web", 0, SUB)
    work.commit()
    work.trim_at("web", BLOCK, BLOCK)
    work.checkpoint()
    work.write_at("web", BLOCK, SUB)
    work.commit()
    work.upkeep()
    work.commit()


def checkpoint_beside_commits(work: Work) -> None:
    """Commits, with a rotation now and then, before calls of a checkpoint."""

    def commit() -> None:
        if work.chance.random() < 0.4:
            work.execute(Label("web", {"filling": "x" * work.chance.choice((10, 3000))}))
            work.write_at("web", 0, SUB)
            work.pool.commit()

    _checkpoint_beside(work, commit)


def checkpoint_beside_writes(work: Work) -> None:
    """Before every call of a checkpoint, writes to new places, which nobody has synced."""

    def write() -> None:
        work.trim_at("web", BLOCK, BLOCK)
        work.write_at("web", BLOCK, BLOCK)

    _checkpoint_beside(work, write)


def _checkpoint_beside(work: Work, between: Callable[[], None]) -> None:
    def hook() -> None:
        work.recorder.before = None
        between()
        work.recorder.before = hook

    pool = work.pool
    pool.want_checkpoint = True
    work.write_at("web", 0, SUB)
    batch = pool.begin()
    batch.sync()
    pool.finish(batch)
    work.recorder.before = hook
    batch.write_checkpoint()
    work.recorder.before = None
    pool.checkpoint_ended(None)
    work.commit()


def full_pool(work: Work) -> None:
    """What is freed is what is written next, as soon as it may be; also before every call of a commit."""
    pool = work.pool
    offsets = list(range(0, 24 * BLOCK, BLOCK))

    def fill() -> None:
        before, work.recorder.before = work.recorder.before, None
        while work.write_at("filler", offsets[0], SUB):
            del offsets[0]
        work.recorder.before = before

    work.execute(Create("filler", 24 * BLOCK))
    fill()
    work.commit()
    for gone in ("fork", "web", "web@1"):
        work.execute(Remove(gone))
        fill()
        batch = pool.begin()
        work.recorder.before = fill
        batch.sync()
        work.recorder.before = None
        pool.finish(batch)
        fill()
        work.upkeep()
        fill()
        work.commit()


def rotation(work: Work) -> None:
    for number in range(6):
        work.execute(Label("web", {"filling": str(number) * 3000}))
        work.write_at("web", number * SUB, SUB)
        work.commit()
        if number % 3 == 2:
            work.pool.journal.prepare_next()


def marks_in_two_sectors(work: Work) -> None:
    """The mark behind the last frame of a segment lies across a sector's end, so it may be torn."""
    log = work.pool.journal
    work.execute(Label("web", {"filling": "x" * 300}))
    before = log._position
    work.commit()
    overhead = log._position - before - 300
    for beyond in (6, 14, 26):
        length = (beyond - HEADER.size - overhead - log._position) % 512 + 512
        work.execute(Label("web", {"filling": "x" * length}))
        work.pool.want_checkpoint = True
        work.commit()


def large_frames(work: Work) -> None:
    """Frames larger than a segment, which have one to themselves and are not preallocated in it."""
    for number in range(2):
        filling = {f"k{index}": str(number) * 4000 for index in range(4)}
        work.execute(Label("web", filling))
        work.commit()
        work.execute(Label("web", {key: None for key in filling}))
        work.commit()


def close_and_open(work: Work) -> None:
    work.write_at("web", 0, BLOCK)
    work.reopen()
    work.execute(Remove("fork"))
    work.checkpoint()
    work.reopen()
    work.write_at("web", 0, 100)
    work.commit()


HISTORIES: dict[str, Callable[[Work], None]] = {
    each.__name__: each
    for each in (
        *(snapshot, clone, rollback, rename_and_label, delete, deferred, resize, trim, full_pool, close_and_open),
        *(merge_with_copies, merge_and_nothing_else, merge_into_a_snapshot, prune),
        *(checkpoint, checkpoint_beside_commits, checkpoint_beside_writes),
        *(rotation, large_frames, marks_in_two_sectors),
    )
}
ALL = ("init", "failed_sync", *HISTORIES)


def run_directed(name: str, seed: int = 0) -> Counts:
    """Cut the power at every event of the history `name`, one of ALL. Raises Failure."""
    chance = random.Random(f"{name} {seed}")
    counts = Counts(steps=1)
    with small(), scratch() as directory:
        judge = Judge(directory, random.Random(seed))
        try:
            if name == "failed_sync":
                counts.cuts = _fail_each_sync(directory, chance, judge)
            elif name == "init":
                counts.cuts = sum(_cut_init(directory, place, chance, judge) for place in _INITS)
            else:
                counts.cuts, counts.events = _cut_history(HISTORIES[name], directory, chance, judge)
        except Exception as error:
            raise Failure(error, f"tools/simulate --directed {name} --seed {seed}") from error
    counts.images = judge.images
    return counts


def _cut_history(
    history: Callable[[Work], None], directory: Path, chance: random.Random, judge: Judge
) -> tuple[int, int]:
    root = directory / "work"
    root.mkdir()
    recorder = Recorder(root)
    Pool.init(root / "pool", size=24 * BLOCK, block_size=BLOCK, files=recorder)
    pool = start(recorder, root / "pool")
    work = Work(chance, recorder, pool, nested=False)
    try:
        _prepare(work)
        first = len(recorder.log)
        history(work)
        work.finish()
    finally:
        recorder.before = None
        abandon(work.pool)
    moments = Cuts("all", chance).at(recorder.log, first)
    cuts, _ = judge_log(recorder, work.oracle, judge, moments, chance, POLICIES, deep=0.2)
    return cuts, len(recorder.log) - first


def _fail_each_sync(directory: Path, chance: random.Random, judge: Judge) -> int:
    """Each sync of a history fails once. It is the last word: no commit is answered after it, and the power is cut."""
    cuts = 0
    for failing in range(1000):
        root = directory / f"fail{failing}"
        root.mkdir()
        Pool.init(root / "pool", size=24 * BLOCK, block_size=BLOCK)
        recorder = Recorder(root)
        pool = start(recorder, root / "pool")
        work = Work(chance, recorder, pool, nested=False)
        recorder.syncs_left = failing
        try:
            work.run_one(_failing)
        finally:
            abandon(work.pool)
        log = recorder.log
        first = next((index for index, event in enumerate(log) if isinstance(event, SyncFails)), len(log))
        count, _ = judge_log(recorder, work.oracle, judge, Cuts("all", chance).at(log, first), chance, POLICIES)
        shutil.rmtree(root)
        cuts += count
        if first == len(log):  # there are no more syncs
            return cuts
    raise AssertionError("a history without an end")


def _failing(work: Work) -> None:
    _prepare(work)
    work.execute(Remove("web@1"))
    work.commit()
    work.merge()
    work.commit()
    work.write_at("web", 0, BLOCK)
    work.checkpoint()
    work.upkeep()
    work.write_at("web", 0, BLOCK)
    work.commit()


def _cut_init(directory: Path, place: str, chance: random.Random, judge: Judge) -> int:
    """A pool is there, whole, or there is none, and one can be made. Once answered, it is there."""
    root, disk_root = directory / f"init-{place}", directory / "disk"
    root.mkdir()
    name, data = _INITS[place]
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "old").write_bytes(bytes(10 * BLOCK))
    recorder = Recorder(root)
    where = None if data is None else root / data
    Pool.init(root / name, size=24 * BLOCK, block_size=BLOCK, data=where, files=recorder)
    answered = len(recorder.log)
    disk = Disk()
    disk.feed(recorder.log[: recorder.adopted])
    for cut in range(recorder.adopted, answered + 1):
        disk.feed(recorder.log[disk.time : cut])
        for kind in POLICIES:
            shutil.rmtree(disk_root, ignore_errors=True)
            disk_root.mkdir()
            materialise(disk.image(Policy(kind, chance)), disk_root)
            judge.images += 1
            _judge_init(disk_root / name, None if data is None else disk_root / data, cut == answered)
    return answered - recorder.adopted + 1


_INITS: dict[str, tuple[str, str | None]] = {  # the pool, and its data where that is elsewhere
    "inside": ("deep/er/pool", None),
    "new": ("pool", "elsewhere/new"),
    "old": ("pool", "elsewhere/old"),
}


def _judge_init(path: Path, data: Path | None, answered: bool) -> None:
    try:
        if data is not None and path.exists():  # the superblock names the place where the pool was made
            superblock = read_superblock(path / "superblock")
            replace(superblock, data=str(data)).write(path / "superblock")
        pool = Pool.open(path, policy=FIXED)
    except NotFound as error:
        if answered or path.exists():
            raise Lost(f"init was {'answered' if answered else 'cut'}, and now: {error}") from error
        Pool.init(path, size=24 * BLOCK, block_size=BLOCK, data=data, force=True)
        pool = Pool.open(path, policy=FIXED)
    except Error as error:
        raise Lost(f"it does not open: {error}") from error
    with pool:
        pool.create("web", BLOCK)

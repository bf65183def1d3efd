"""One seed: work, cuts of the power during it, and what each leaves. A failure says how to see it again.

A run has several lives: a disk that was judged sound is where the next one goes on, so that recovered pools, with
torn tails cut and files left over, are worked on and cut as well.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdthin.pool import journal as journal_module
from nbdthin.pool import pool as pool_module
from nbdthin.pool.pool import Pool
from nbdthin.units import KiB
from simulatelib.disk import KEPT, LOST, MIXED, Disk, Policy, Tree, materialise
from simulatelib.judge import Judge, contents
from simulatelib.oracle import Frozen, Head, Image, Lost, Oracle
from simulatelib.record import Event, Note, Recorder, SyncBegins, SyncEnds
from simulatelib.watched import FIXED, WatchedPool
from simulatelib.work import Work

BLOCK = 16 * KiB
LIFE = 150  # steps of work between two cuts that the run goes on from
POLICIES = (LOST, KEPT, MIXED, MIXED)


class Failure(Exception):
    """What was found, where, and the command that shows it again."""

    def __init__(self, error: Exception, command: str) -> None:
        what = str(error) if isinstance(error, Lost) else "".join(traceback.format_exception(error))
        super().__init__(f"{what}\n    {command}")
        self.error = error


@dataclass
class Counts:
    steps: int = 0
    events: int = 0
    cuts: int = 0
    images: int = 0

    def add(self, other: Counts) -> None:
        self.steps += other.steps
        self.events += other.events
        self.cuts += other.cuts
        self.images += other.images

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.events} events, {self.cuts} cuts, {self.images} disks opened and compared"


@contextmanager
def small(*more: tuple[object, str, object]) -> Iterator[None]:
    """Constants of the engine for pools whose journals turn over within a few commits; `more`: module, name, value."""
    values: list[tuple[object, str, object]] = [
        (journal_module, "SEGMENT_BYTES", 8 * KiB),
        (journal_module, "_ZEROES", bytes(2 * KiB)),
        (pool_module, "CHECKPOINT_JOURNAL", 24 * KiB),
        (pool_module, "RUN_BYTES", 4 * BLOCK),
        *more,
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    for module, name, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: nothing here needs a disk, least of all its sync."""
    shm = Path("/dev/shm")
    usable = shm.is_dir() and shutil.disk_usage(shm).free > 1 << 30
    directory = Path(tempfile.mkdtemp(prefix="nbdthin-simulate-", dir=shm if usable else None))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def start(recorder: Recorder, path: Path, *, exact: bool = True) -> WatchedPool:
    """Open the pool at `path`, recorded, with an oracle that knows what it holds now."""
    pool = WatchedPool.open(path, autocommit=False, files=recorder, policy=FIXED)
    oracle = Oracle(recorder.note, pool.block_size // 16, pool.journal.sequence, exact)
    for name, each in contents(pool).items():
        kept = Frozen(each.content) if each.snapshot else Head(bytearray(each.content))
        oracle.images[name] = Image(each.size, dict(each.labels), kept)
    oracle.recovered()
    pool.oracle = oracle
    pool.serve()
    return pool


def abandon(pool: Pool) -> None:
    """Let go of a pool as a crash does: nothing is written any more."""
    pool.fail(OSError(5, "the power is gone"))
    pool.close()


class Cuts:
    """Which moments of a log the power is cut at, and how often."""

    def __init__(self, kind: str, chance: random.Random) -> None:
        """`kind`: "sync" (before and after each sync, and some others), or "all"."""
        self._kind = kind
        self._chance = chance

    def at(self, log: Sequence[Event], first: int) -> list[int]:
        """Numbers of events behind which the power is cut."""
        result = []
        for index in range(first, len(log) + 1):
            before = log[index - 1] if index else None
            if index < len(log) and isinstance(before, Note) and not isinstance(log[index], SyncBegins | SyncEnds):
                continue  # a note changes no disk; the cut comes with the event before or behind it
            after = log[index] if index < len(log) else None
            sync = isinstance(before, SyncEnds) or isinstance(after, SyncBegins | SyncEnds)
            if self._kind == "all" or sync or index == len(log) or self._chance.random() < 0.05:
                result.append(index)
        return result


def judge_log(
    recorder: Recorder,
    oracle: Oracle,
    judge: Judge,
    cuts: Iterable[int],
    chance: random.Random,
    policies: Sequence[str] = POLICIES,
    deep: float = 0.03,
) -> tuple[int, Tree | None]:
    """Judge disks for every cut; the number of cuts, and one disk that was found sound. Raises Lost.

    `deep` is the part of them whose recovery is cut as well.
    """
    disk, count, kept = Disk(), 0, None
    for cut in cuts:
        disk.feed(recorder.log[disk.time : cut])
        bounds = oracle.bounds(cut)
        count += 1
        seen: list[Tree] = []
        for kind in policies:
            tree = disk.image(Policy(kind, chance))
            if tree in seen:
                continue
            seen.append(tree)
            try:
                judge.image(tree, oracle, bounds, deep=chance.random() < deep)
            except Lost as lost:
                raise Lost(
                    f"cut behind event {cut} of {len(recorder.log)}, {kind}: {lost}\n{_near(recorder, cut)}"
                ) from lost
            if kept is None or chance.random() < 0.05:
                kept = tree
    return count, kept


def _near(recorder: Recorder, cut: int) -> str:
    """The events around a cut."""
    lines = []
    for index in range(max(cut - 12, 0), min(cut + 3, len(recorder.log))):
        text = repr(recorder.log[index])
        lines.append(f"        {'  cut >' if index == cut else '       '} {index}: {text[:150]}")
    return "\n".join(lines)


def run_seed(seed: int, steps: int, cuts: str = "sync") -> Counts:
    """Work of `steps` steps on the synchronous engine. Raises Failure."""
    counts = Counts(steps=steps)
    chance = random.Random(seed)
    with small(), scratch() as directory:
        judge = Judge(directory, random.Random(seed + 1))
        tree: Tree | None = None
        try:
            for life in range(-(-steps // LIFE)):
                root = directory / f"life{life}"
                root.mkdir()
                if tree is None:
                    Pool.init(root / "pool", size=chance.choice((24, 40, 64)) * BLOCK, block_size=BLOCK)
                else:
                    materialise(tree, root)
                tree = _live(root, chance, judge, min(LIFE, steps - life * LIFE), cuts, counts) or tree
                shutil.rmtree(root)
        except Exception as error:
            raise Failure(error, f"tools/simulate --seed {seed} --steps {steps} --cuts {cuts}") from error
        finally:
            counts.images = judge.images
    return counts


def _live(root: Path, chance: random.Random, judge: Judge, steps: int, cuts: str, counts: Counts) -> Tree | None:
    recorder = Recorder(root)
    pool = start(recorder, root / "pool")
    first = len(recorder.log)  # what opening wrote was answered to nobody; judge.py cuts that
    work = Work(chance, recorder, pool)
    if chance.random() < 0.15:
        recorder.syncs_left = chance.randrange(60)
    try:
        work.run(steps)
    finally:
        recorder.before = None
        abandon(work.pool)
    counts.events += len(recorder.log) - recorder.adopted
    moments = Cuts(cuts, chance).at(recorder.log, first)
    done, tree = judge_log(recorder, work.oracle, judge, moments, chance)
    counts.cuts += done
    return tree

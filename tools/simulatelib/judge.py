"""Opens a disk that a power cut left with the real engine, and holds it against the oracle.

Each disk must open, check clean, hold what it may hold, take writes and commits, and open again with them. Recovery
writes, too: what it wrote is recorded, and the power is cut again after each of its calls.
"""

from __future__ import annotations

import random
import shutil
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from nbdthin.errors import Error, NoSpace
from nbdthin.pool import commands, sums
from nbdthin.pool.check import check
from nbdthin.pool.files import Files
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import is_deferred
from nbdthin.pool.scrub import Scrub
from simulatelib.disk import KEPT, LOST, MIXED, Disk, Policy, Tree, materialise
from simulatelib.oracle import Bounds, Found, Lost, Oracle
from simulatelib.record import Note, Recorder
from simulatelib.watched import FIXED


class Rebooted(Files):
    """The real thing, on a machine that has come up again: what only the page cache held is gone."""

    def boot_id(self) -> str:
        return "after the cut"


Compare = Callable[[int, dict[str, Found]], None]  # (frame, what is there); raises Lost


def contents(pool: Pool) -> dict[str, Found]:
    """Everything a pool holds."""
    return {
        name: Found(row.snapshot, row.size, row.labels, pool.volume(name).read(0, row.size))
        for name, row in pool.state.names.items()
    }


class Judge:
    """Judges disks in `directory`, which is emptied for each."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self._root = directory / "disk"
        self._chance = chance
        self.images = 0  # opened
        self._known: deque[tuple[Tree, int, dict[str, Found]]] = deque(maxlen=6)

    def image(self, tree: Tree, oracle: Oracle, bounds: Bounds, *, deep: bool = False) -> int:
        """Raises Lost. Returns the frame that was recovered. `deep`: cut the power during recovery as well.

        A disk that was opened a moment ago is what it was: only what had been answered may be more by now.
        """
        if not deep:
            for known, frame, there in self._known:
                if known == tree:
                    oracle.judge(bounds, frame, there)
                    return frame

        def compare(frame: int, there: dict[str, Found]) -> None:
            oracle.judge(bounds, frame, there)
            self._known.append((tree, frame, there))

        if not deep:
            return self._open(tree, compare, Rebooted())
        self._place(tree)
        recorder = Recorder(self._root)
        frame = self._recover(compare, recorder)
        log, disk = recorder.log, Disk()
        disk.feed(log[: recorder.adopted])
        for index in range(recorder.adopted, len(log)):
            if isinstance(log[index], Note):  # behind it, work goes on
                break
            disk.feed(log[index : index + 1])
            for kind in (LOST, KEPT, MIXED):

                def same(again: int, there: dict[str, Found]) -> None:
                    if again != frame:
                        raise Lost(f"recovered to frame {again} after a second cut, to {frame} before")
                    oracle.judge(bounds, again, there)

                self._open(disk.image(Policy(kind, self._chance)), same, Rebooted())
        return frame

    def _place(self, tree: Tree) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        materialise(tree, self._root)

    def _open(self, tree: Tree, compare: Compare, files: Files) -> int:
        self._place(tree)
        return self._recover(compare, files)

    def _recover(self, compare: Compare, files: Files) -> int:
        self.images += 1
        path = self._root / "pool"
        try:
            pool = Pool.open(path, autocommit=False, files=files, policy=FIXED)
        except Error as error:
            raise Lost(f"it does not open: {error}") from error
        try:
            if isinstance(files, Recorder):
                files.note("recovered")
            _sound(pool)
            _unspoilt(pool)
            frame = pool.journal.sequence
            found = contents(pool)
            compare(frame, found)
            wanted = self._use(pool, found)
            for piece in islice(sums.missing(pool), self._chance.randrange(30)):
                piece.run()
        finally:
            if pool.failed is None:
                pool.close()
        try:
            with Pool.open(path, autocommit=False, policy=FIXED) as pool:
                _sound(pool)
                _unspoilt(pool)
                if contents(pool) != wanted:
                    raise Lost(f"recovered to frame {frame}, and what was written then is not what is read later")
        except Error as error:
            raise Lost(f"recovered to frame {frame}, worked on, and it does not open again: {error}") from error
        return frame

    def _use(self, pool: Pool, found: dict[str, Found]) -> dict[str, Found]:
        """Write to a pool and commit: it must be one that can be used. Returns what it holds then."""
        wanted = dict(found)
        chance = self._chance
        volumes = [name for name, each in found.items() if not each.snapshot]
        shown = [name for name in volumes if not is_deferred(name)]
        if shown and chance.random() < 0.3:
            name = chance.choice(shown)
            pool.execute([commands.Snapshot(name, "after")])
            wanted["after"] = found[name]._replace(snapshot=True, labels={})
        for name in volumes[:2]:
            size = found[name].size
            offset = chance.randrange(0, size, 512)
            data = chance.randbytes(min(chance.choice((512, 1024, 20_000)), size - offset))
            try:
                pool.volume(name).write(offset, data)
            except NoSpace:
                continue
            content = bytearray(wanted[name].content)
            content[offset : offset + len(data)] = data
            wanted[name] = wanted[name]._replace(content=bytes(content))
        if found and chance.random() < 0.3:
            name = chance.choice(list(found))
            pool.execute([commands.Remove(name)])
            del wanted[name]
        if chance.random() < 0.3:
            pool.journal.start_segment()  # what lies behind the last frame is then in the middle of the journal
        pool.commit()
        if chance.random() < 0.3:
            pool.merge_all()
        return wanted


def _unspoilt(pool: Pool) -> None:
    """No checksum says that data is damaged."""
    for piece in Scrub(pool).checks():
        piece.read()
        for finding in piece.findings(()):
            raise Lost(f"a scrub finds {finding}")


def _sound(pool: Pool) -> None:
    problems = check(pool)
    if problems:
        raise Lost(f"check: {'; '.join(problems)}")

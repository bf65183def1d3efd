"""Nothing that is damaged passes silently: it is found, refused by open, and repair says exactly what it costs.

A pool with several volumes, snapshots and clones, a checkpoint and two segments behind it, is damaged in every way there
is. The oracle is what every name read as before. What repair does not name as lost must read right.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt, Error, Locked
from nbdthin.pool import journal as journal_module
from nbdthin.pool.check import check_path
from nbdthin.pool.journal import HEADER, frame, mark, parse_frame
from nbdthin.pool.layers import LEAF_MASK
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Entries, Layer, Name, encode, u64
from nbdthin.pool.repair import Repair, repair
from nbdthin.pool.salvage import DOUBTFUL, GONE, Loss
from nbdthin.pool.superblock import DATA_HEADER
from nbdthin.units import KiB

from .conftest import Pools, checkpoints, flip, frames, logs, pattern

BLOCK = 16 * KiB
SUB = KiB
SIZE = 16 * BLOCK  # of each volume

Contents = dict[str, bytes]


def read_all(pool: Pool) -> Contents:
    return {row.name: pool.volume(row.name).read(0, row.size) for row in pool.list()}


def checkpoint(pool: Pool) -> None:
    pool.journal.bytes_since_checkpoint = 1 << 40
    pool.label("web", {"checkpoint": "here"})


def build(pool: Pool) -> None:
    """Names of every kind, and nameless layers; a checkpoint; then two segments of frames."""
    pool.create("base", SIZE)
    pool.volume("base").write(0, pattern(4 * BLOCK, 1))
    pool.snapshot("base", "base@1")
    pool.clone("base@1", "web")
    pool.volume("web").write(BLOCK + SUB, pattern(3 * SUB, 2))
    checkpoint(pool)
    pool.snapshot("web", "web@1", labels={"comment": "x" * 1200})
    pool.volume("web").write(5 * BLOCK, pattern(2 * BLOCK, 3))
    pool.volume("web").write(BLOCK, pattern(SUB, 4))
    pool.clone("web@1", "db", labels={"comment": "y" * 1200})
    pool.volume("db").write(3 * BLOCK, pattern(BLOCK, 5))
    pool.volume("db").discard(0, 2 * SUB)
    pool.commit()
    pool.volume("base").write(8 * BLOCK, pattern(BLOCK, 6))
    pool.commit()
    pool.snapshot("base", "base@2", labels={"comment": "z" * 800})
    pool.volume("base").write(8 * BLOCK, pattern(SUB, 7))
    pool.rename("db", "data")
    pool.resize("data", 12 * BLOCK)
    pool.volume("data").write(4 * BLOCK, pattern(BLOCK + 5, 8))
    pool.journal.prepare_next()
    pool.commit()


@dataclass
class Sample:
    """A pool on disk, how it was, and a place where copies of it are damaged."""

    path: Path
    contents: Contents
    scratch: Path

    def copy(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        for source in self.path.rglob("*"):
            target = self.scratch / source.relative_to(self.path)
            if source.is_dir():
                target.mkdir()
            else:
                sparse_copy(source, target)
        return self.scratch


def sparse_copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        position = 0
        while position < size:
            try:
                position = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(old.fileno(), position, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), end - position, position), position)
            position = end


@pytest.fixture(params=["closed", "killed"])
def sample(request: pytest.FixtureRequest, pools: Pools, small_segments: int, tmp_path: Path) -> Sample:
    """Closed cleanly; or copied while it was open, as a kill leaves it, with data that no commit knows."""
    pool = pools.make(size=4096 * KiB, block_size=BLOCK)
    build(pool)
    contents = read_all(pool)
    path = tmp_path / "sample"
    if request.param == "killed":
        pool.volume("web").write(10 * BLOCK, pattern(BLOCK, 9))
        shutil.copytree(pool.path, path)
    else:
        shutil.copytree(pools.close(pool), path)
    assert len(logs(path)) == 2 and len(checkpoints(path)) == 1 and (path / "journal" / "next").exists()
    assert check_path(path).problems == ()
    return Sample(path, contents, tmp_path / "damaged")


# -- what must hold after a repair


def named(losses: Iterable[Loss]) -> bool:
    """A commit is lost, and so names may be."""
    return any(not loss.name for loss in losses)


def assert_right(contents: Contents, pool: Pool, losses: Sequence[Loss]) -> None:
    """What is not named as lost reads as before."""
    found = read_all(pool)
    assert all(name in contents or named(losses) for name in found)
    for name, wanted in contents.items():
        if name not in found:
            assert named(losses), f"{name} is gone, and nobody says so"
            continue
        excused = bytearray(max(len(wanted), len(found[name])))
        for loss in losses:
            if loss.name == name and loss.length:
                excused[loss.offset : loss.offset + loss.length] = b"\1" * loss.length
        if len(found[name]) != len(wanted):
            assert any(excused) and named(losses), f"{name} has another size"
        for offset in range(0, min(len(wanted), len(found[name])), SUB):
            if found[name][offset : offset + SUB] != wanted[offset : offset + SUB]:
                assert excused[offset], f"{name} reads wrong at {offset}, and nobody says so: {losses}"


def assert_repaired(path: Path, contents: Contents) -> Repair:
    """Repair, check, a second repair that changes nothing, open, compare and write."""
    before = check_path(path)
    done = repair(path)
    assert bool(done.damage) == bool(before.problems), (before.problems, done.damage)
    assert check_path(path).problems == (), done.damage
    again = repair(path)
    assert (again.damage, again.lost, again.kept) == ((), (), ())
    with Pool.open(path) as pool:
        assert_right(contents, pool, done.lost)
        pool.create("new", SIZE)
        pool.volume("new").write(0, pattern(2 * BLOCK, 99))
    with Pool.open(path) as pool:
        assert pool.volume("new").read(0, 2 * BLOCK) == pattern(2 * BLOCK, 99)
        assert_right(contents, pool, [*done.lost, Loss("", 0, 0, "the new one")])
    return done


def refused(path: Path) -> bool:
    try:
        Pool.open(path, inspect=True).close()
    except Error:
        return True
    return False


# -- every byte of every file


LONG = os.environ.get("NBDTHIN_LONG") == "1"  # repair after every single flip, not after one in EACH
EACH = 7


def offsets(path: Path) -> Iterator[int]:
    """Every byte that differs from those before it, and a sample of those that do not: zeroes, long texts."""
    data = path.read_bytes()[: DATA_HEADER if path.name == "data" else None]
    alike = 0
    for offset, value in enumerate(data):
        alike = alike + 1 if offset and value == data[offset - 1] else 0
        if alike < 12 or alike % 151 == 0 or offset == len(data) - 1:
            yield offset


def masks(offset: int) -> tuple[int, ...]:
    return (0xFF,) if offset % 3 else (1 << offset % 8,)


def test_no_flipped_byte_of_any_metadata_file_passes_silently(sample: Sample) -> None:
    path = sample.path
    files = [path / "superblock", path / "data", *sorted((path / "journal").iterdir())]
    counted: dict[str, list[int]] = {}
    for file in files:
        for offset in offsets(file):
            for mask in masks(offset):
                flip(file, offset, mask)
                where = f"{file.name} byte {offset} mask {mask:#x}"
                report = check_path(path)
                assert report.problems or report.notes, f"{where} passes silently"
                assert refused(path) == bool(report.problems), (where, report)
                assert str(file) in "".join((*report.problems, *report.notes)), (where, report)
                count = counted.setdefault(file.name, [0, 0, 0])
                count[0] += 1
                if report.problems:
                    count[1] += 1
                    if LONG or count[1] % EACH == 1:
                        done = assert_repaired(sample.copy(), sample.contents)
                        count[2] += bool(done.lost)
                elif offset % 5 == 0:
                    with Pool.open(sample.copy()) as pool:
                        assert_right(sample.contents, pool, ())
                flip(file, offset, mask)
    print(counted)
    assert check_path(path).problems == () == check_path(path).notes

"""Nothing that is damaged passes silently: it is found, refused by open, and repair says exactly what it costs.

A pool with several volumes, snapshots and clones, a checkpoint and two segments behind it, is damaged in every way.
The oracle is what every name read as before. What repair does not name as lost must read right.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt, Error, Locked, NotFound
from nbdthin.pool.check import check_path
from nbdthin.pool.dump import dump, restore
from nbdthin.pool.files import Files
from nbdthin.pool.journal import HEADER, Journal
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Counter, End, Entries, Layer, Name, Size, encode, u64
from nbdthin.pool.repair import Repair, release, repair
from nbdthin.pool.salvage import DOUBTFUL, GONE, Loss
from nbdthin.pool.superblock import DATA_HEADER
from nbdthin.units import KiB

from .conftest import Pools, checkpoints, flip, frames, kill, logs, pattern

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
    pool.volume("db").trim(0, 2 * SUB)
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
EACH = 11


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
                elif offset % 11 == 0:
                    with Pool.open(sample.copy()) as pool:
                        assert_right(sample.contents, pool, ())
                flip(file, offset, mask)
    assert all(count[0] and not count[2] for count in counted.values()), f"one wrong byte costs nothing: {counted}"
    assert check_path(path).problems == () == check_path(path).notes


# -- damage of larger extent, each with what survives it


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def wipe(path: Path, number: int) -> tuple[int, int]:
    """Zero the payload of a frame of a file but for its last byte; its offset and end."""
    offset, end = frames(path)[number]
    overwrite(path, offset + HEADER.size, bytes(end - offset - HEADER.size - 1))
    return offset, end


def lose_nothing(done: Repair) -> None:
    assert done.lost == ()


def lose_some(done: Repair) -> None:
    assert named(done.lost)


def truncated_checkpoint(path: Path) -> str:
    file = checkpoints(path)[0]
    os.truncate(file, file.stat().st_size // 2)
    return f"{file} at byte 0: a damaged frame"


def lost_checkpoint(path: Path) -> str:
    checkpoints(path)[0].unlink()
    return "0000000000000005.checkpoint is missing"


def wiped_frame(path: Path) -> str:
    offset, _ = wipe(logs(path)[0], 1)
    return f"{logs(path)[0]} at byte {offset}: a damaged frame: commit 6 lost"


def wiped_first_frame(path: Path) -> str:
    offset, _ = wipe(logs(path)[1], 0)
    return f"{logs(path)[1]} at byte {offset}: a damaged frame: commit 10 lost"


def wiped_last_frame(path: Path) -> str:
    last = len(frames(logs(path)[1])) - 1
    offset, _ = wipe(logs(path)[1], last)
    return f"{logs(path)[1]} at byte {offset}: a damaged frame: commit {10 + last} lost"


def lost_first_segment(path: Path) -> str:
    logs(path)[0].unlink()
    return "0000000000000005.log at byte 0: commits 5 to 9 cannot be read: they are lost"


def lost_last_segment(path: Path) -> str:
    logs(path)[1].unlink()
    return "000000000000000a.log: this segment is missing: commits 10 and later lost"


def truncated_segment(path: Path) -> str:
    file = logs(path)[1]
    cut = frames(file)[1][1] - 5
    os.truncate(file, cut)
    return f"{file} at byte {cut}: the segment was cut off here"


def segment_cut_in_its_zeroes(path: Path) -> str:
    file = logs(path)[1]
    size = frames(file)[-1][1] + HEADER.size
    os.truncate(file, size)
    return f"{file} at byte {size}: the segment was cut off here"


def swapped_segments(path: Path) -> str:
    one, two = logs(path)
    one.rename(path / "swap")
    two.rename(one)
    (path / "swap").rename(two)
    return f"{one} at byte 0: this is 000000000000000a.log under another name"


def renamed_checkpoint(path: Path) -> str:
    file = checkpoints(path)[0]
    file.rename(file.with_name("0000000000000007.checkpoint"))
    return "0000000000000007.checkpoint at byte 0: this is 0000000000000005.checkpoint under another name"


def segment_in_place_of_the_next(path: Path) -> str:
    file = logs(path)[1]
    file.rename(path / "journal" / "next")
    return "next at byte 0: this is 000000000000000a.log under another name"


def truncated_superblock(path: Path) -> str:
    os.truncate(path / "superblock", 30)
    return "superblock is damaged"


def lost_superblock(path: Path) -> str:
    (path / "superblock").unlink()
    return "the superblock is missing"


def zeroed_data_header(path: Path) -> str:
    overwrite(path / "data", 0, bytes(512))
    return "data at byte 0: not the data of a pool"


def truncated_data(path: Path) -> str:
    os.truncate(path / "data", 4096 * KiB - 1)
    return f"data at byte {4096 * KiB - 1}: it has {4096 * KiB - 1} bytes, the pool needs {4096 * KiB}"


def cut_data(path: Path) -> str:
    os.truncate(path / "data", 100 * BLOCK)
    return "it was truncated"


def frame_twice(path: Path) -> str:
    file = logs(path)[1]
    offset, end = frames(file)[-1]
    overwrite(file, end, file.read_bytes()[offset:end])
    return f"{file} at byte {end}: frame"


def everything_at_once(path: Path) -> str:
    flip(path / "superblock", 20)
    flip(checkpoints(path)[0], 40)
    wiped_frame(path)
    flip(logs(path)[1], 40)
    overwrite(path / "journal" / "next", 7, b"x")
    return "superblock is damaged"


DAMAGES: list[tuple[Callable[[Path], str], Callable[[Repair], None]]] = [
    (truncated_checkpoint, lose_some),
    (lost_checkpoint, lose_some),
    (wiped_frame, lose_some),
    (wiped_first_frame, lose_some),
    (wiped_last_frame, lose_some),
    (lost_first_segment, lose_some),
    (lost_last_segment, lose_some),
    (truncated_segment, lose_some),
    (segment_cut_in_its_zeroes, lose_nothing),
    (swapped_segments, lose_nothing),
    (renamed_checkpoint, lose_nothing),
    (segment_in_place_of_the_next, lose_nothing),
    (truncated_superblock, lose_nothing),
    (lost_superblock, lose_nothing),
    (zeroed_data_header, lose_nothing),
    (truncated_data, lose_nothing),
    (frame_twice, lose_nothing),
    (everything_at_once, lose_some),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=lambda value: value.__name__)
def test_a_damage_is_found_named_refused_and_repaired(
    sample: Sample, damage: Callable[[Path], str], expected: Callable[[Repair], None]
) -> None:
    path = sample.copy()
    message = damage(path)
    report = check_path(path)
    assert any(message in problem for problem in report.problems), report.problems
    assert refused(path)
    expected(assert_repaired(path, sample.contents))


def sealed(done: Repair, *names: str) -> None:
    assert not {loss.name for loss in done.lost} & set(names), done.lost


def test_snapshots_survive_a_lost_commit_unharmed(sample: Sample) -> None:
    path = sample.copy()
    wiped_last_frame(path)
    done = assert_repaired(path, sample.contents)
    sealed(done, "base@1", "web@1", "base@2")
    assert {loss.what for loss in done.lost if loss.length} == {DOUBTFUL}


def test_several_damages_are_all_found_in_one_run(sample: Sample) -> None:
    path = sample.copy()
    everything_at_once(path)
    report = check_path(path)
    places = ["superblock at byte", ".checkpoint at byte 0", "5.log at byte", "a.log at byte"]
    assert all(any(place in problem for problem in report.problems) for place in places), report.problems
    assert any("next at byte 7" in note for note in report.notes)


def test_a_lost_checkpoint_costs_nothing_where_the_older_one_and_all_frames_are_left(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, small_segments: int
) -> None:
    """As when the power went between the new checkpoint's rename and the removal of what it replaces."""
    pool = pools.make(size=4096 * KiB, block_size=BLOCK)
    build(pool)
    with monkeypatch.context() as patch:
        patch.setattr(pool.journal, "_remove_before", lambda _: None)
        checkpoint(pool)
    pool.volume("web").write(0, pattern(SUB, 12))
    pool.commit()
    contents = read_all(pool)
    path = pools.close(pool)
    assert len(checkpoints(path)) == 2
    newest = checkpoints(path)[-1]
    overwrite(newest, 100, bytes(300))
    assert refused(path)
    done = assert_repaired(path, contents)
    assert done.damage and done.lost == ()


def test_entries_of_a_layer_that_a_lost_commit_made_are_kept_under_a_name(pools: Pools) -> None:
    pool = pools.make(size=4096 * KiB, block_size=BLOCK, autocommit=False)
    pool.create("a", SIZE)
    pool.commit()
    pool.create("b", SIZE)
    pool.commit()
    pool.volume("b").write(2 * BLOCK, pattern(BLOCK, 3))
    pool.commit()
    pool.volume("a").write(0, pattern(SUB, 4))
    pool.commit()
    path = pools.close(pool)
    wipe(logs(path)[0], 1)
    done = repair(path)
    again = pools.open(path)
    assert [row.name for row in again.list()] == ["a", "lost/layer-2"]
    assert again.volume("lost/layer-2").read(2 * BLOCK, BLOCK) == pattern(BLOCK, 3)
    assert any(loss.name == "lost/layer-2" and "its size is a guess" in loss.what for loss in done.lost)
    assert again.volume("a").read(0, SUB) == pattern(SUB, 4)
    assert not any(loss.name == "a" and loss.length and loss.offset == 0 for loss in done.lost), "it was said again"


def test_of_two_owners_the_later_entry_wins_and_the_range_of_the_other_is_named(pools: Pools) -> None:
    pool = pools.make(size=4096 * KiB, block_size=BLOCK)
    pool.create("a", SIZE)
    pool.create("b", SIZE)
    pool.volume("a").write(0, pattern(2 * BLOCK))
    pool.commit()
    entry = pool.volume("a").layer.entry(1)
    layer = pool.volume("b").layer.number
    pool.journal.append(encode([Entries(layer, u64([5]), u64([entry]))]))
    path = pools.crash(pool)
    first, second = frames(logs(path)[0])[2][0], frames(logs(path)[0])[3][0]
    (problem,) = check_path(path).problems
    assert f"at byte {first}: block 1 of layer 1 shares physical block" in problem
    assert f"at byte {second} says the other" in problem and problem.endswith("it concerns a")
    done = repair(path)
    assert done.lost == (Loss("a", BLOCK, BLOCK, GONE),)
    again = pools.open(path)
    assert again.volume("b").read(5 * BLOCK, BLOCK) == pattern(2 * BLOCK)[BLOCK:]
    assert again.volume("a").read(0, 2 * BLOCK) == pattern(2 * BLOCK)[:BLOCK] + bytes(BLOCK)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (Layer(7, 6), "layer 6 does not exist"),
        (Layer(7, 1), "layer 7 is reached by no name"),
        (Name("x", False, 9, SIZE, 0.0, {}), "layer 9 does not exist"),
        (Entries(1, u64([3]), u64([1 << 50 | 1])), "block 3 of layer 1 lies outside the pool; it concerns a"),
        (Entries(1, u64([3]), u64([9 << 32 | 1 << 16 | 1])), "block 3 of layer 1 is data and zero at once"),
        (Entries(9, u64([3]), u64([9 << 32 | 1])), "layer 9 does not exist"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tuple) else None,
)
def test_a_record_that_does_not_add_up_is_named_by_its_frame_and_the_rest_stays(
    pools: Pools, wrong: Layer | Name | Entries, what: str
) -> None:
    pool = pools.make(size=4096 * KiB, block_size=BLOCK)
    pool.create("a", SIZE)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.commit()
    pool.journal.append(encode([wrong]))
    contents = read_all(pool)
    path = pools.crash(pool)
    problems = check_path(path).problems
    assert any(what in problem for problem in problems), problems
    assert_repaired(path, contents)


def test_data_that_was_cut_off_is_named_by_volume_and_range(sample: Sample) -> None:
    path = sample.copy()
    with Pool.open(path, inspect=True) as pool:
        layer = pool.volume("base").layer
        cut = layer.own[0][8] >> 32
    os.truncate(path / "data", cut * BLOCK)
    done = repair(path)
    assert Loss("base", 8 * BLOCK, BLOCK, GONE) in done.lost
    with Pool.open(path) as pool:
        assert_right(sample.contents, pool, done.lost)
        assert pool.volume("base").read(8 * BLOCK, SUB) == bytes(SUB)


@pytest.fixture
def grown(pools: Pools) -> Pool:
    """A pool that has grown, with data in what it has grown by."""
    pool = pools.make(size=32 * BLOCK, block_size=BLOCK)
    pool.create("a", 40 * BLOCK)
    os.truncate(pool.data.path, 64 * BLOCK)
    pool.journal.append(encode([Size(64 * BLOCK)]))
    pool = pools.open(pools.crash(pool))
    pool.volume("a").write(0, pattern(40 * BLOCK))
    pool.commit()
    return pool


def test_a_pool_that_has_grown_is_repaired_in_its_size(pools: Pools, grown: Pool) -> None:
    contents = read_all(grown)
    path = pools.close(grown)
    flip(logs(path)[0], frames(logs(path)[0])[1][0] + HEADER.size)
    done = repair(path)
    assert done.damage and done.lost == ()
    assert check_path(path).problems == ()
    again = pools.open(path)
    assert again.state.size == 64 * BLOCK and read_all(again) == contents


def test_a_pool_whose_growth_is_lost_keeps_what_is_in_use(pools: Pools, grown: Pool) -> None:
    contents = read_all(grown)
    path = pools.close(grown)
    wipe(logs(path)[0], 1)
    done = repair(path)
    assert any("had grown" in loss.what for loss in done.lost)
    assert check_path(path).problems == ()
    assert read_all(pools.open(path)) == contents


def test_data_that_was_cut_below_what_the_pool_has_grown_to_is_found(pools: Pools, grown: Pool) -> None:
    path = pools.close(grown)
    os.truncate(path / "data", 36 * BLOCK)
    assert any("the pool needs 1048576: it was truncated" in problem for problem in check_path(path).problems)
    done = repair(path)
    assert {(loss.name, loss.what) for loss in done.lost} == {("a", GONE)}
    assert check_path(path).problems == ()
    pools.open(path)


def test_a_grown_pool_is_dumped_and_restored(pools: Pools, grown: Pool, tmp_path: Path) -> None:
    path = pools.close(grown)
    (tmp_path / "dump").write_text("".join(dump(path)))
    restore(tmp_path / "dump", path, force=True)
    assert "".join(dump(path)) == (tmp_path / "dump").read_text()
    assert pools.open(path).state.size == 64 * BLOCK


# -- how repair behaves


class Crash(Exception):
    """The process ended here."""


def test_a_dry_run_says_the_same_and_changes_nothing(sample: Sample) -> None:
    path = sample.copy()
    everything_at_once(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    tried = repair(path, dry_run=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    done = repair(path)
    assert (tried.damage, tried.lost, tried.notes) == (done.damage, done.lost, done.notes)
    assert tried.kept == () and len(done.kept) == 2


def test_what_was_damaged_is_kept_beside_the_pool(sample: Sample) -> None:
    path = sample.copy()
    flip(path / "superblock", 20)
    flip(path / "data", 3000)
    flip(checkpoints(path)[0], 3)
    before = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(Corrupt):
        repair(path)  # the superblock and its copy at once
    flip(path / "data", 3000)
    done = repair(path)
    superblock, journal = done.kept
    assert superblock.read_bytes() == before[Path("superblock")]
    assert {file.name: file.read_bytes() for file in journal.iterdir()} == {
        file.name: data for file, data in before.items() if file.parent.name == "journal"
    }


def test_a_crash_at_any_step_of_a_repair_leaves_a_pool_that_can_be_repaired(sample: Sample) -> None:
    class Failing(Files):
        def __init__(self, after: int) -> None:
            self.left = after

    def step(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(Files, name)

        def call(self: Failing, *arguments: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise Crash
            return real(self, *arguments)

        return call

    for name in ("open", "sync", "truncate", "rename", "exchange", "sync_directory"):
        setattr(Failing, name, step(name))
    after = 0
    while True:
        path = sample.copy()
        everything_at_once(path)
        try:
            repair(path, files=Failing(after))
        except Crash:
            after += 1
            repair(path)
            assert check_path(path).problems == ()
            with Pool.open(path) as pool:
                assert sealed_contents(pool) == {name: sample.contents[name] for name in ("base@1",)}
            continue
        break
    assert after > 15


def test_free_blocks_are_not_swept_after_a_repair_with_loss_until_they_are_let_go(sample: Sample) -> None:
    path = sample.copy()
    wiped_frame(path)
    done = repair(path)
    assert (path / "repaired").read_text() == "".join(f"{loss}\n" for loss in done.lost)
    for _ in range(2):  # a kill, and another
        pool = Pool.open(path)
        pool.unsynced.start(pool.journal.sequence + 1)
        kill(pool)
        again = Pool.open(path, inspect=True)
        assert again.unsynced.left and not again.has_leftovers
        again.close()
    Pool.open(path).close()
    assert any("`nbdthin repair --release`" in note for note in check_path(path).notes)
    release(path)
    with Pool.open(path) as pool:
        assert pool.has_leftovers, "it was closed cleanly, and has space to give back"
    with pytest.raises(NotFound):
        release(path)
    assert check_path(path).notes == () == check_path(path).problems


def test_a_dump_restored_after_a_repair_with_loss_brings_it_all_back(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("".join(dump(sample.path)))
    path = sample.copy()
    lost_last_segment(path)
    assert repair(path).lost
    pool = Pool.open(path)
    pool.unsynced.start(pool.journal.sequence + 1)
    kill(pool)
    with Pool.open(path) as pool:
        assert not pool.has_leftovers
    restore(tmp_path / "dump", path, force=True)
    assert not (path / "repaired").exists()
    with Pool.open(path) as pool:
        assert read_all(pool) == sample.contents


def test_a_repair_without_loss_holds_nothing_back(sample: Sample) -> None:
    path = sample.copy()
    truncated_superblock(path)
    assert repair(path).lost == () and not (path / "repaired").exists()


def test_a_file_system_that_cannot_exchange_names_is_repaired_all_the_same(sample: Sample) -> None:
    class Plain(Files):
        left = 1000

        def exchange(self, one: Path, two: Path) -> None:
            raise OSError(errno.EINVAL, "no such thing here")

        def rename(self, old: Path, new: Path) -> None:
            self.left -= 1
            if not self.left:
                raise Crash
            super().rename(old, new)

    path = sample.copy()
    wiped_frame(path)
    files = Plain()
    done = repair(path, files=files)
    assert check_path(path).problems == () and all(kept.exists() for kept in done.kept)
    path = sample.copy()
    wiped_frame(path)
    files.left = 1000 - files.left  # the last rename
    with pytest.raises(Crash):
        repair(path, files=files)
    assert not (path / "journal").exists()
    again = repair(path)
    assert [loss.name for loss in again.lost] == [loss.name for loss in done.lost]
    assert check_path(path).problems == ()


def sealed_contents(pool: Pool) -> Contents:
    return {name: data for name, data in read_all(pool).items() if name == "base@1"}


def test_the_data_of_another_pool_is_never_given_a_header(pools: Pools, sample: Sample) -> None:
    path = sample.copy()
    other = pools.close(pools.make(size=4096 * KiB, block_size=BLOCK))
    shutil.copy(other / "data", path / "data")
    assert "data of another pool" in check_path(path).problems[0]
    with pytest.raises(Corrupt, match="data of another pool"):
        repair(path)
    (path / "data").write_bytes(pattern(4096 * KiB))
    with pytest.raises(Corrupt, match="not the data of a pool"):
        repair(path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_file_that_is_named_as_the_data_is_not_written_unless_its_header_shows_that_it_is(
    sample: Sample, tmp_path: Path, missing: bool
) -> None:
    path, file = sample.copy(), tmp_path / "notes.txt"
    if missing:
        (path / "data").unlink()
    else:
        overwrite(path / "data", 0, bytes(512))
    for content in (b"somebody's notes\n", b"", pattern(4096 * KiB), bytes(4096 * KiB)):
        file.write_bytes(content)
        with pytest.raises(Corrupt, match="nothing shows that it is this pool's"):
            repair(path, data=file)
        assert "nothing shows" in check_path(path, data=file).problems[0]
        if len(content) < 4096 * KiB:
            with pytest.raises(Corrupt, match="not this pool's"):
                repair(path, data=file, write_header=True)
        assert file.read_bytes() == content


def test_data_whose_header_is_gone_is_taken_by_whoever_insists(sample: Sample, tmp_path: Path) -> None:
    path = sample.copy()
    (path / "data").rename(tmp_path / "moved")
    overwrite(tmp_path / "moved", 0, pattern(DATA_HEADER))
    with pytest.raises(Corrupt, match="--write-header"):
        repair(path, data=tmp_path / "moved")
    assert repair(path, data=tmp_path / "moved", write_header=True).lost == ()
    with Pool.open(path) as pool:
        assert read_all(pool) == sample.contents


def test_a_damaged_header_that_still_has_the_uuid_is_known(sample: Sample, tmp_path: Path) -> None:
    path = sample.copy()
    (path / "data").rename(tmp_path / "moved")
    for offset in (3, 20, 50):
        flip(tmp_path / "moved", offset)
        assert repair(path, data=tmp_path / "moved").lost == ()
        shutil.copy(sample.path / "superblock", path / "superblock")
    overwrite(tmp_path / "moved", 16, pattern(16))
    with pytest.raises(Corrupt, match="nothing shows"):
        repair(path, data=tmp_path / "moved")


# -- what is no file


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.mkdir()


def as_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:  # a longer path is not bound to
        bound.bind(path.name)


KINDS = [(as_fifo, "a FIFO"), (as_directory, "a directory"), (as_socket, "a socket")]


@pytest.mark.parametrize("name", ["superblock", "data", "sums", "log", "checkpoint", "unsynced.0", "unsynced.1"])
@pytest.mark.parametrize(("kind", "called"), KINDS, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_no_file_is_named_waited_for_by_nobody_and_put_aside(
    sample: Sample, kind: Callable[[Path], None], called: str, name: str
) -> None:
    path = sample.copy()
    place = {"log": logs(path)[1], "checkpoint": checkpoints(path)[0]}.get(name, path / name)
    if name.startswith("unsynced"):
        place = path / "journal" / name
    place.unlink(missing_ok=True)
    kind(place)
    with pytest.raises(Corrupt, match=f"{place}: this is {called}, not a regular file"):
        Pool.open(path)
    (problem, *_) = check_path(path).problems
    assert problem.startswith(f"{place}: this is {called}, not a regular file")
    if name == "data":
        with pytest.raises(Corrupt, match=f"{place}: this is {called}"):
            repair(path)
    else:
        assert_repaired(path, sample.contents)
        (aside,) = [item for item in path.rglob(f"{place.name}*") if item.is_dir() or not item.is_file()]
        assert "damaged-1" in str(aside)


def test_what_stands_in_the_place_of_the_next_segment_is_replaced(sample: Sample) -> None:
    path = sample.copy()
    (path / "journal" / "next").unlink()
    as_fifo(path / "journal" / "next")
    assert check_path(path).problems == ()
    with Pool.open(path) as pool:
        pool.create("new", SIZE)
    assert (path / "journal" / "next").is_file()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_journal_of_another_pool_is_refused_by_all_and_nothing_is_changed(
    pools: Pools, sample: Sample, checkpointed: bool
) -> None:
    path = sample.copy()
    other = pools.make(size=4096 * KiB, block_size=BLOCK)
    other.create("web", SIZE)
    if checkpointed:
        checkpoint(other)
    uuid, own = other.superblock.uuid, Pool.open(path, inspect=True)
    own.close()
    shutil.rmtree(path / "journal")
    shutil.copytree(pools.close(other) / "journal", path / "journal")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    file = checkpoints(path)[-1]
    message = f"{file} at byte 0: this is of pool {uuid}, not of pool {own.superblock.uuid}"
    with pytest.raises(Corrupt, match=message):
        Pool.open(path)
    assert check_path(path).problems == (message,)
    with pytest.raises(Corrupt, match=f"{message}, as {path / 'superblock'} and {path / 'data'} say"):
        repair(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_lost_superblock_is_not_made_from_data_that_is_not_the_journals(pools: Pools, sample: Sample) -> None:
    path = sample.copy()
    other = pools.close(pools.make(size=4096 * KiB, block_size=BLOCK))
    (path / "superblock").unlink()
    shutil.copy(other / "data", path / "data")
    with pytest.raises(Corrupt, match=f"this is of pool .*, as {path / 'data'} say") as caught:
        repair(path)
    assert caught.value.path.parent == path / "journal"
    assert not (path / "superblock").exists()


def test_a_journal_from_before_that_names_no_pool_is_opened_and_named_by_its_next_checkpoint(pools: Pools) -> None:
    path = pools.close(pools.make(size=4096 * KiB, block_size=BLOCK))
    shutil.rmtree(path / "journal")
    Journal.create(path / "journal", encode([Counter(1), End(1)]))
    (note,) = check_path(path).notes
    assert note.startswith(f"{path / 'journal'}: it does not say which pool it is of")
    assert check_path(path).problems == () == repair(path).damage
    pool = pools.open(path)
    pool.create("web", SIZE)
    checkpoint(pool)
    pools.close(pool)
    assert check_path(path).notes == ()


def test_data_that_moved_is_found_where_it_is_said_to_be(sample: Sample, tmp_path: Path) -> None:
    path = sample.copy()
    (path / "data").rename(tmp_path / "moved")
    assert any("data is missing" in problem for problem in check_path(path).problems)
    with pytest.raises(Error, match="--data FILE"):
        repair(path)
    done = repair(path, data=tmp_path / "moved")
    assert done.lost == ()
    assert check_path(path).problems == ()
    with Pool.open(path) as pool:
        assert read_all(pool) == sample.contents


def test_a_pool_in_use_is_left_alone(pools: Pools) -> None:
    pool = pools.make()
    for verb in (check_path, repair):
        with pytest.raises(Locked):
            verb(pool.path)


# -- chance


def at_random(path: Path, chance: random.Random) -> str:
    """Damage one thing; what it was."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock")
    file = chance.choice(files)
    size = DATA_HEADER if file.name == "data" else file.stat().st_size
    kind = chance.choice(["flip", "flip", "zero", "garbage", "cut", "swap", "delete", "copy"])
    place = chance.randrange(max(size, 1))
    if kind == "flip" and size:
        flip(file, place, chance.randrange(1, 256))
    elif kind in ("zero", "garbage") and size:
        start = place - place % 512
        length = min(512, size - start)
        overwrite(file, start, bytes(length) if kind == "zero" else chance.randbytes(length))
    elif kind == "cut" and file.name != "data":
        os.truncate(file, place)
    elif kind in ("swap", "copy") and file.name != "data":
        other = chance.choice([other for other in files if other.name not in (file.name, "data")] or [file])
        one, two = file.read_bytes(), other.read_bytes()
        other.write_bytes(one)
        if kind == "swap":
            file.write_bytes(two)
    elif kind == "delete" and file.name != "data":
        file.unlink()
    return f"{kind} {file.name} {place}"


# What zeroes or bytes from elsewhere in place of the last frame and its mark cost, nobody can tell (FORMAT.md).
SAID = {"flip", "cut", "swap"}


@pytest.mark.parametrize("turn", range(200 if LONG else 8))
def test_random_damage_is_repaired_or_refused_in_one_line(sample: Sample, turn: int) -> None:
    for number in range(8):
        seed = f"{turn} {number}"
        chance = random.Random(seed)
        path = sample.copy()
        done = [at_random(path, chance) for _ in range(chance.randint(1, 4))]
        try:
            check_path(path)
            repaired = repair(path)
        except Error as error:
            assert len(str(error).splitlines()) == 1
            continue
        where = f"seed {seed!r}: {done}"
        assert check_path(path).problems == (), where
        assert repair(path).damage == (), where
        with Pool.open(path) as pool:
            pool.create("another", SIZE)
            pool.volume("another").write(0, pattern(BLOCK, 99))
        if {what.split()[0] for what in done} <= SAID:
            with Pool.open(path) as pool:
                assert_right(sample.contents, pool, [*repaired.lost, Loss("", 0, 0, "another")])

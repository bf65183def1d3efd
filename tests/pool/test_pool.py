"""Making, opening, committing and failing; a pool on a device; what `list`, `show` and `info` say."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin.errors import Error, Exists, Invalid, Locked, NoSpace, PoolFailed
from nbdthin.pool.check import check_path
from nbdthin.pool.journal import Journal
from nbdthin.pool.pool import Pool
from nbdthin.pool.superblock import Superblock
from nbdthin.units import GiB, KiB, MiB, TiB

from .conftest import BLOCK, SUB, Calls, Faults, Pools, contents, pattern, run

# -- making


def test_a_new_pool_is_empty_and_costs_no_space(pools: Pools) -> None:
    pool = pools.make(size="100 GiB", block_size=64 * KiB)
    assert pool.list() == []
    assert pool.data.path.stat().st_size == 100 * GiB
    assert pool.data.path.stat().st_blocks * 512 <= 64 * KiB


@pytest.mark.parametrize("block_size", [16 * KiB, 32 * KiB, 64 * KiB, 128 * KiB, 256 * KiB, 512 * KiB, MiB])
def test_every_block_size_works(pools: Pools, block_size: int) -> None:
    pool = pools.make(size=32 * block_size, block_size=block_size)
    pool.create("v", 4 * block_size)
    pool.volume("v").write(5, data := pattern(2 * block_size))
    pool.snapshot("v", "s")
    pool.volume("v").write(block_size // 16, b"x")
    assert pool.volume("s").read(5, 2 * block_size) == data
    assert pool.allocator.used == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 8 * KiB}, "not a block size: 8 KiB"),
        ({"block_size": 2 * MiB}, "not a block size: 2 MiB"),
        ({"block_size": 48 * KiB}, "not a block size: 48 KiB"),
        ({"block_size": "x"}, "not a size: 'x'"),
        ({"size": 15 * BLOCK}, "a pool of 64 KiB blocks has 1 MiB to 256 TiB"),
        ({"size": 16 * BLOCK - 1}, "a pool of 64 KiB blocks has 1 MiB to 256 TiB"),
        ({"size": 300 * TiB}, "a pool of 64 KiB blocks has 1 MiB to 256 TiB"),
        ({"size": "lots"}, "not a size: 'lots'"),
        ({"data": "/dev/null"}, "/dev/null is neither a file nor a block device"),
        ({"data": "/tmp"}, "/tmp is neither a file nor a block device"),
    ],
)
def test_what_cannot_be_a_pool_is_refused_and_leaves_nothing(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(Invalid, match=message) as caught:
        Pool.init(tmp_path / "deep" / "pool", **arguments)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_last_part_of_a_block_is_not_used(tmp_path: Path) -> None:
    Pool.init(tmp_path / "pool", size=16 * BLOCK + 5)
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.superblock.size == 16 * BLOCK


def test_a_pool_is_not_made_over_a_pool_or_anything_else(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make()
    with pytest.raises(Exists, match="is a pool already"):
        Pool.init(pool.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(Exists, match="exists and is not empty"):
            Pool.init(path)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize("prepare", ["empty", "link", "nothing", "leftover"])
def test_a_pool_is_made_at_a_free_place(pools: Pools, tmp_path: Path, prepare: str) -> None:
    place = tmp_path / "at" / "here"
    if prepare == "empty":
        place.mkdir(parents=True)
    elif prepare == "link":
        (tmp_path / "elsewhere").mkdir()
        place.parent.mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    elif prepare == "leftover":  # of an init that was killed
        place.with_name("here.new").mkdir(parents=True)
    pools.make(path=place).create("v", 512)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", [(Journal, "create"), (Superblock, "write"), (os, "rename")], ids=lambda step: step[1])
def test_an_init_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, force: bool, step: tuple[object, str]
) -> None:
    data = tmp_path / "data"
    if existing:
        data.write_bytes(b"something\n" * 1000 if force else bytes(10_000))
    before = [(path, path.read_bytes()) for path in tmp_path.iterdir()]

    real_rename = os.rename

    def full(*arguments: object) -> None:
        if step[1] == "rename" and not Path(str(arguments[0])).is_dir():  # only the last one, of the pool itself
            return real_rename(str(arguments[0]), str(arguments[1]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NoSpace):
        patch.setattr(*step, full)
        Pool.init(tmp_path / "deep" / "pool", size=MiB, data=data, force=force)
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == before


def test_data_in_a_file_of_its_own_is_found_by_its_path(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make(data=tmp_path / "elsewhere")
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    assert (pool.info().data_path, (pool.path / "data").exists()) == (tmp_path / "elsewhere", False)
    assert (tmp_path / "elsewhere").stat().st_size == pool.superblock.size


def test_a_file_that_holds_something_is_not_taken_without_force(tmp_path: Path) -> None:
    for offset in (0, 4095, 64 * KiB, 2 * MiB - 1):
        data = tmp_path / "data"
        data.write_bytes(bytes(offset) + b"x" + bytes(2 * MiB - offset - 1))
        before = data.read_bytes()
        with pytest.raises(Exists, match="holds something already"):
            Pool.init(tmp_path / "pool", data=data, size=MiB)
        assert data.read_bytes() == before
    Pool.init(tmp_path / "pool", data=data, size=MiB, force=True)
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.list() == []


def test_a_file_keeps_the_size_that_it_has_beyond_the_pool(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(3 * MiB))
    Pool.init(tmp_path / "pool", data=tmp_path / "data", size=2 * MiB)
    assert (tmp_path / "data").stat().st_size == 3 * MiB


# -- opening


def test_a_pool_opened_twice_is_refused(pools: Pools) -> None:
    pool = pools.make()
    for work in (lambda: Pool.open(pool.path), lambda: check_path(pool.path)):
        with pytest.raises(Locked, match="open in another process"):
            work()
    pool.create("v", 512)


def test_data_of_an_open_pool_is_refused_to_another(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make(data=tmp_path / "data")
    with pytest.raises(Locked, match="the data of a pool that is open"):
        Pool.init(tmp_path / "other", data=tmp_path / "data", force=True)
    assert not (tmp_path / "other").exists()
    pool.create("v", 512)


HOLD = """
import sys, time
from nbdthin.pool.pool import Pool
from nbdthin.pool.superblock import Superblock
pool = Pool.open(sys.argv[1], autocommit=False)
pool.create("v", 512)
pool.commit()
pool.create("lost", 512)
print("open", flush=True)
time.sleep(60)
"""


def test_a_pool_open_in_another_process_is_refused_until_that_has_ended(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdthin.pool.journal.SEGMENT_BYTES", 4 * MiB)  # what the other process asks for
    path = pools.close(pools.make())
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            with pytest.raises(Locked, match="open in another process"):
                Pool.open(path)
            with pytest.raises(Locked):
                check_path(path)
        finally:
            process.send_signal(signal.SIGKILL)
    assert [row.name for row in pools.open(path).list()] == ["v"]


def test_a_pool_whose_directory_moved_opens_there(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    path = pools.close(pool).rename(tmp_path / "moved")
    assert pools.open(path).volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_what_opens_a_pool_to_look_at_it_changes_nothing(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.commit()
    path = pools.crash(pool)
    with open(sorted((path / "journal").glob("*.log"))[-1], "r+b") as file:
        file.seek(500)
        file.write(b"a torn tail")
    before = {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")}
    assert check_path(path).problems == ()
    with Pool.open(path, inspect=True) as pool, pytest.raises(PoolFailed, match="to be looked at"):
        pool.create("w", MiB)
    assert {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")} == before
    pools.open(path)


# -- committing


def test_what_was_not_committed_is_gone_after_a_crash(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.commit()
    pool.volume("v").write(0, pattern(BLOCK))
    pool.create("w", MiB)
    pool = pools.open(pools.crash(pool))
    assert contents(pool) == {"v": []}
    assert pool.allocator.used == 0


def test_each_verb_is_durable_when_it_returns(pools: Pools) -> None:
    pool = pools.make()
    verbs: list[Callable[[], None]] = [
        lambda: pool.create("v", MiB),
        lambda: pool.snapshot("v", "s"),
        lambda: pool.clone("s", "c"),
        lambda: pool.rename("c", "d"),
        lambda: pool.resize("d", 2 * MiB),
        lambda: pool.label("d", {"k": "v"}),
        lambda: pool.rollback("v", "s"),
        lambda: pool.remove("s"),
    ]
    for verb in verbs:
        verb()
        assert not pool.has_changes
        before = pool.list()
        pool = pools.open(pools.crash(pool))
        assert [(row.name, row.size, row.labels) for row in pool.list()] == [
            (row.name, row.size, row.labels) for row in before
        ]


def test_closing_commits(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool = pools.open(pools.close(pool))
    assert pool.volume("v").read(0, BLOCK) == pattern(BLOCK)


@pytest.fixture
def watched(quiet: Pool, monkeypatch: pytest.MonkeyPatch) -> tuple[Pool, Calls]:
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(BLOCK))
    quiet.commit()
    calls = Calls(monkeypatch)
    calls.watch(quiet.data, "sync", "data")
    calls.watch(quiet.journal, "append", "journal")
    return quiet, calls


def test_data_is_durable_before_the_metadata_that_points_to_it(watched: tuple[Pool, Calls]) -> None:
    pool, calls = watched
    pool.volume("v").write(BLOCK, pattern(BLOCK))
    pool.commit()
    assert calls.seen == ["data", "journal"]


def test_copied_data_is_durable_before_a_merge_that_points_to_it(watched: tuple[Pool, Calls]) -> None:
    pool, calls = watched
    pool.snapshot("v", "s")
    pool.volume("v").write(0, pattern(SUB))
    pool.remove("s")
    pool.commit()
    calls.seen.clear()
    pool.merge_all()
    assert calls.seen == ["data", "journal"]


def test_an_overwrite_in_place_costs_one_sync(watched: tuple[Pool, Calls]) -> None:
    pool, calls = watched
    pool.volume("v").write(5, b"in place")
    pool.commit()
    assert calls.seen == ["data"]


def test_a_command_without_data_costs_one_sync(watched: tuple[Pool, Calls]) -> None:
    pool, calls = watched
    pool.snapshot("v", "s")
    pool.commit()
    assert calls.seen == ["journal"]


def test_a_commit_of_nothing_does_nothing(watched: tuple[Pool, Calls]) -> None:
    pool, calls = watched
    pool.volume("v").read(0, BLOCK)
    pool.commit()
    assert calls.seen == []


def test_what_changes_after_begin_belongs_to_the_next_batch(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK, 1))
    batch = pool.begin()
    pool.volume("v").write(BLOCK, pattern(BLOCK, 2))
    pool.volume("v").trim(0, SUB)
    pool.snapshot("v", "s")
    batch.sync()
    pool.finish(batch)
    assert pool.has_changes
    pool = pools.open(pools.crash(pool))
    assert [row.name for row in pool.list()] == ["v"]
    assert pool.volume("v").read(0, 2 * BLOCK) == pattern(BLOCK, 1) + bytes(BLOCK)


def test_a_write_that_ends_during_a_sync_is_left_for_the_next_one(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    batch = pool.begin()
    pool.volume("v").write(0, b"in place")
    batch.sync()
    pool.finish(batch)
    assert pool.data.dirty
    assert pool.begin()._sync_data


# -- failing


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("part", ["data", "journal"])
def test_a_failed_sync_is_final_and_reads_go_on(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, part: str, code: int
) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK, 1))
    pool.commit()
    pool.volume("v").write(BLOCK, pattern(BLOCK, 2))
    if part == "data":
        fault = Faults(monkeypatch, pool.data, "sync", code)
    else:
        fault = Faults(monkeypatch, pool.journal, "append", code)
    with pytest.raises(PoolFailed, match=os.strerror(code)):
        pool.commit()
    fault.active = False
    for work in (pool.commit, pool.begin, lambda: pool.create("w", MiB), lambda: pool.volume("v").write(0, b"x")):
        with pytest.raises(PoolFailed) as caught:
            work()
        assert len(str(caught.value).splitlines()) == 1
    assert fault.calls == 1, "nothing is tried again"
    assert pool.info().failed is not None
    assert pool.volume("v").read(0, 2 * BLOCK) == pattern(BLOCK, 1) + pattern(BLOCK, 2)
    pool = pools.reopen(pool)
    assert pool.volume("v").read(0, 2 * BLOCK) == pattern(BLOCK, 1) + bytes(BLOCK)


def test_no_metadata_is_written_when_the_data_could_not_be(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    Faults(monkeypatch, pool.data, "sync", errno.EIO)
    calls = Calls(monkeypatch)
    calls.watch(pool.journal, "append", "journal")
    with pytest.raises(PoolFailed):
        pool.commit()
    assert calls.seen == []


def test_blocks_freed_by_a_batch_that_failed_are_not_used_again(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.commit()
    pool.volume("v").trim(0, BLOCK)
    Faults(monkeypatch, pool.journal, "append", errno.EIO)
    with pytest.raises(PoolFailed):
        pool.commit()
    assert pool.take_reclaimable() is None
    pool = pools.reopen(pool)
    assert pool.volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_a_verb_says_that_the_pool_has_failed(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make()
    Faults(monkeypatch, pool.journal, "append", errno.EIO)
    with pytest.raises(PoolFailed):
        pool.create("v", MiB)
    pool = pools.reopen(pool)
    assert pool.list() == []


def test_a_hole_that_cannot_be_punched_loses_space_and_not_data(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK))
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "punch", errno.EIO)
        pool.volume("v").trim(0, BLOCK)
        pool.commit()
    assert (pool.allocator.used, pool.allocator.pending, pool.failed) == (1, 0, None)
    assert pool.volume("v").read(0, 2 * BLOCK) == bytes(BLOCK) + pattern(2 * BLOCK)[BLOCK:]


def test_removing_does_not_fail_because_a_merge_does(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, data := pattern(BLOCK))
    pool.snapshot("v", "s")
    pool.volume("v").write(0, pattern(SUB, 2))
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "read_into", errno.EIO)
        pool.remove("s")
    assert pool.volume("v").read(0, BLOCK) == pattern(SUB, 2) + data[SUB:]
    pool = pools.reopen(pool)
    pool.create("w", MiB)
    assert len(pool.state.layers) == 2, "it was merged later"


# -- what is said of it


def test_rows_say_what_there_is(pools: Pools) -> None:
    before = time.time()
    pool = pools.make()
    pool.create("b", MiB, labels={"k": "v"})
    pool.snapshot("b", "b@1")
    pool.snapshot("b", "b@2")
    pool.clone("b@1", "a", size=2 * MiB)
    rows = pool.list()
    assert [(row.name, row.kind, row.size, row.parent, row.labels) for row in rows] == [
        ("a", "volume", 2 * MiB, "b@1", {}),
        ("b", "volume", MiB, "b@2", {"k": "v"}),
        ("b@1", "snapshot", MiB, None, {}),
        ("b@2", "snapshot", MiB, "b@1", {}),
    ]
    assert all(before <= row.created <= time.time() for row in rows)
    assert pool.show("a") == rows[0]
    pool.remove("b@1")
    assert [pool.show(name).parent for name in ("a", "b@2")] == [None, None]
    assert pools.reopen(pool).show("b") == pool.show("b")


def test_info_adds_up(pools: Pools) -> None:
    pool = pools.make(size=64 * MiB)
    pool.create("a", 100 * MiB)
    pool.create("b", 26 * MiB)
    pool.volume("a").write(0, pattern(3 * BLOCK))
    pool.snapshot("a", "s")
    info = pool.info()
    assert (info.path, info.block_size, info.uuid) == (pool.path, BLOCK, pool.superblock.uuid)
    assert (info.data_total, info.data_used) == (64 * MiB - BLOCK, 3 * BLOCK)
    assert info.data_available == info.data_total - info.data_used
    assert (info.volumes, info.snapshots, info.layers) == (2, 1, 3)
    assert info.virtual_size == 126 * MiB
    assert info.oversubscription == 126 * MiB / info.data_total
    assert info.sequence == 3
    assert 0 < info.journal < 4 * KiB
    assert info.checkpoint == (pool.path / "journal" / "0000000000000001.checkpoint").stat().st_size
    files = [path.stat().st_size for path in [pool.path / "superblock", *(pool.path / "journal").iterdir()]]
    assert info.metadata_used == sum(files)
    assert info.metadata_total == info.metadata_used + info.metadata_available
    assert info.failed is None


def test_available_is_no_more_than_the_file_system_has(pools: Pools) -> None:
    pool = pools.make(size="10 TiB")
    stat = os.statvfs(pool.path)
    assert pool.info().data_available <= stat.f_blocks * stat.f_frsize


# -- on a block device


def test_a_pool_lives_on_a_block_device(loop: Path, pools: Pools) -> None:
    pool = pools.make(data=loop, size=64 * MiB)
    assert pool.info().data_total == 64 * MiB - BLOCK
    pool.create("v", MiB)
    pool.volume("v").write(100, data := pattern(3 * BLOCK))
    pool.snapshot("v", "s")
    pool.volume("v").write(0, pattern(SUB))
    pool = pools.reopen(pool)
    assert pool.volume("s").read(100, 3 * BLOCK) == data


def test_the_size_of_a_device_is_its_own_where_none_is_given(loop: Path, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="has 64 MiB, less than 65M"):
        Pool.init(tmp_path / "pool", data=loop, size="65M")
    Pool.init(tmp_path / "pool", data=loop)
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.superblock.size == 64 * MiB


def test_a_discard_reaches_what_is_below_the_device(loop: Path, pools: Pools, tmp_path: Path) -> None:
    pool = pools.make(data=loop, size=64 * MiB)
    pool.create("v", 32 * MiB)
    pool.volume("v").write(0, pattern(32 * MiB))
    pool.commit()
    backing = tmp_path / "backing"
    full = backing.stat().st_blocks * 512
    assert full >= 32 * MiB
    pool.volume("v").trim(0, 32 * MiB)
    pool.commit()
    # The file system may need a block of its own to say where the holes are.
    assert backing.stat().st_blocks * 512 <= full - 32 * MiB + 64 * KiB
    assert pool.volume("v").read(0, MiB) == bytes(MiB)


@pytest.mark.parametrize("force", [False, True])
def test_a_mounted_device_is_refused_even_by_force(loop: Path, tmp_path: Path, force: bool) -> None:
    run("mkfs.ext4", "-q", str(loop))
    (tmp_path / "mounted").mkdir()
    run("mount", str(loop), str(tmp_path / "mounted"))
    try:
        with pytest.raises((Locked, Exists)):
            Pool.init(tmp_path / "pool", data=loop, force=force)
    finally:
        run("umount", str(tmp_path / "mounted"))
    assert not (tmp_path / "pool").exists()
    run("e2fsck", "-fn", str(loop))


@pytest.mark.parametrize("offset", [0, 512, 1024, 4 * KiB, 64 * KiB + 64, 64 * MiB - 512])
def test_a_device_that_holds_something_is_refused_without_force(loop: Path, tmp_path: Path, offset: int) -> None:
    """Where file systems, partition tables and RAIDs have their marks."""
    fd = os.open(loop, os.O_RDWR)
    os.pwrite(fd, b"x", offset)
    os.fsync(fd)
    os.close(fd)
    with pytest.raises(Exists, match="holds something already"):
        Pool.init(tmp_path / "pool", data=loop)
    assert not (tmp_path / "pool").exists()
    Pool.init(tmp_path / "pool", data=loop, force=True)
    Pool.open(tmp_path / "pool").close()


def test_a_device_in_use_by_an_open_pool_is_refused(loop: Path, pools: Pools, tmp_path: Path) -> None:
    pool = pools.make(data=loop, size=64 * MiB)
    with pytest.raises(Locked):
        Pool.init(tmp_path / "other", data=loop, force=True)
    pool.create("v", 512)


def test_a_device_of_another_pool_is_refused(loop: Path, tmp_path: Path) -> None:
    Pool.init(tmp_path / "one", data=loop)
    Pool.init(tmp_path / "two", data=loop, force=True)
    with pytest.raises(Error, match="not the data of this pool"):
        Pool.open(tmp_path / "one")
    Pool.open(tmp_path / "two").close()

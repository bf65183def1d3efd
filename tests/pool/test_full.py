"""A pool, or the file system below it, without space: what goes on, what is refused, and how it comes back."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt, Invalid, NoSpace, OverQuota
from nbdthin.pool import events
from nbdthin.pool.events import Levels
from nbdthin.pool.policy import Policy
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Size, encode
from nbdthin.units import KiB, MiB
from tests.conftest import Ballast

from .conftest import BLOCK, Faults, Pools, checkpoints, fill, logs, pattern, run

GROWING = Policy(min_free=0)


def blocks(pool: Pool, count: int) -> bytes:
    return pattern(count * pool.block_size)


def charged(pool: Pool, name: str) -> int:
    """Blocks that a volume is charged with."""
    return pool.show(name).charged // pool.block_size


# -- 100 %


def test_a_full_pool_restarts_and_takes_overwrites_snapshots_trims_and_removals(pools: Pools, full: Pool) -> None:
    fill(full)
    pool = pools.reopen(full, autocommit=False)
    assert pool.allocator.free == 0
    filler = pool.volume("filler")
    filler.write(0, b"overwritten in place")
    pool.snapshot("filler", "s")
    pool.commit()
    assert filler.read(0, 20) == b"overwritten in place"
    with pytest.raises(NoSpace):
        filler.write(0, b"shared now, and so it needs a block")
    filler.trim(0, 64 * KiB)
    pool = pools.reopen(pool, autocommit=False)
    with pytest.raises(NoSpace):
        pool.volume("filler").write(0, b"the snapshot has them still")
    pool.remove("s")
    pool.commit()
    pool.merge_all()
    pool.commit()
    pool.volume("filler").write(0, b"now there is room")


# -- min_free


def test_under_min_free_there_are_no_new_volumes_or_clones_and_all_else_goes_on(pools: Pools) -> None:
    pool = pools.make(size=21 * BLOCK, policy=Policy(auto_extend=False))
    pool.create("v", MiB)
    pool.snapshot("v", "s")
    pool.volume("v").write(0, blocks(pool, 16))
    pool.create("w", 64 * KiB * 16)
    pool.volume("w").write(0, blocks(pool, 3))
    for refused in (partial(pool.create, "x", MiB), partial(pool.clone, "s", "x")):
        with pytest.raises(NoSpace) as error:
            refused()
        assert str(error.value).startswith("64 KiB of 1.25 MiB are free, less than min_free of 10%: no new volumes")
        assert "\n" not in str(error.value) and "nbdthin extend SIZE" in str(error.value)
    assert [row.name for row in pool.list()] == ["s", "v", "w"]
    pool.volume("w").write(3 * BLOCK, blocks(pool, 1))
    pool.snapshot("v", "s2")
    pool.rollback("v", "s")
    pool.remove("s2")
    pool.create("x", MiB)


def test_a_batch_that_creates_under_min_free_changes_nothing(pools: Pools) -> None:
    pool = pools.make(size=21 * BLOCK, policy=Policy(auto_extend=False))
    pool.create("v", 2 * MiB)
    pool.volume("v").write(0, blocks(pool, 19))
    with pytest.raises(NoSpace, match="min_free"), pool.batch():
        pool.snapshot("v", "s")
        pool.clone("s", "c")
    assert [row.name for row in pool.list()] == ["v"]


def test_free_space_is_what_the_file_system_has_left_where_that_is_less(small_disk: Path, pools: Pools) -> None:
    pool = pools.make(path=small_disk / "pool", size="100 GiB", policy=Policy())
    pool.create("v", "1 GiB")
    pool.create("w", "1 GiB")
    usage = pool.usage()
    assert usage.total < 20 * MiB and usage.free > 0.9 * usage.total
    pool.volume("v").write(0, bytes([1]) * (usage.free - MiB))
    pool.commit()
    with pytest.raises(NoSpace, match="min_free"):
        pool.create("x", "1 GiB")
    pool.remove("v")
    pool.create("x", "1 GiB")


# -- quota


@pytest.fixture
def limited(pools: Pools) -> Pool:
    """Volume v, which may take eight of 63 blocks of 16 KiB."""
    pool = pools.make(size=MiB, block_size=16 * KiB)
    pool.create("v", 2 * MiB)
    pool.quota("v", 8 * 16 * KiB + 100)
    return pool


def test_a_quota_is_exact_and_the_volume_is_named(limited: Pool) -> None:
    volume = limited.volume("v")
    volume.write(0, blocks(limited, 5))
    with pytest.raises(OverQuota):
        volume.write(5 * 16 * KiB, blocks(limited, 4))
    volume.write(5 * 16 * KiB, blocks(limited, 3))
    before = limited.allocator.used
    with pytest.raises(OverQuota, match=r"'v' is at its quota of 128 KiB \(nbdthin quota v SIZE"):
        volume.write(8 * 16 * KiB, b"x")
    with pytest.raises(OverQuota):
        volume.write_zeroes(8 * 16 * KiB, 16 * KiB, allocate=True)
    volume.write(0, b"in place")
    assert (limited.allocator.used, charged(limited, "v")) == (before, 8)
    volume.trim(0, 16 * KiB)
    volume.write(9 * 16 * KiB, b"x")
    limited.quota("v", None)
    volume.write(10 * 16 * KiB, blocks(limited, 10))


def test_small_writes_stop_at_the_quota_too(limited: Pool) -> None:
    volume = limited.volume("v")
    written = 0
    with pytest.raises(OverQuota):
        for written in range(100):
            offset = written * 16 * KiB
            if not volume.write_small(offset, memoryview(bytes(1024))):
                volume.write(offset, bytes(1024))
    assert written == 8


def test_own_snapshots_are_charged_and_removing_them_gives_room(limited: Pool) -> None:
    limited.volume("v").write(0, blocks(limited, 6))
    limited.snapshot("v", "v@1")
    assert charged(limited, "v") == 6 and limited.show("v@1").quota is None
    limited.volume("v").write(0, blocks(limited, 2))
    with pytest.raises(OverQuota):
        limited.volume("v").write(2 * 16 * KiB, b"x")
    limited.remove("v@1")
    assert charged(limited, "v") == 6, "what the snapshot had alone is free, the rest was merged"
    limited.volume("v").write(6 * 16 * KiB, blocks(limited, 2))


def test_a_clone_and_a_rolled_back_volume_begin_with_nothing(limited: Pool) -> None:
    limited.volume("v").write(0, blocks(limited, 8))
    limited.snapshot("v", "v@1")
    limited.clone("v@1", "c")
    assert (limited.show("c").quota, charged(limited, "c")) == (None, 0)
    limited.quota("c", 16 * KiB)
    limited.volume("c").write(0, b"x")
    with pytest.raises(OverQuota):
        limited.volume("c").write(16 * KiB, b"x")
    limited.rollback("v", "v@1")
    assert (limited.show("v").quota, charged(limited, "v")) == (8 * 16 * KiB + 100, 0)
    limited.volume("v").write(0, blocks(limited, 8))
    with pytest.raises(OverQuota):
        limited.volume("v").write(8 * 16 * KiB, b"x")


def test_limits_survive_a_rename_a_restart_and_a_checkpoint(
    pools: Pools, limited: Pool, eager_checkpoints: None
) -> None:
    limited.reserve("v", 64 * KiB)
    limited.volume("v").write(0, blocks(limited, 7))
    limited.snapshot("v", "s")
    limited.rename("v", "w")
    for turn in range(3):
        limited = pools.reopen(limited)
        row = limited.show("w")
        assert (row.quota, row.reservation, row.charged) == (8 * 16 * KiB + 100, 64 * KiB, (7 + bool(turn)) * 16 * KiB)
        if not turn:
            limited.volume("w").write(0, b"x")
        with pytest.raises(OverQuota):
            limited.volume("w").write(16 * KiB, b"x")


def test_who_inherits_the_image_pays_for_it(pools: Pools) -> None:
    pool = pools.make()
    pool.create("image", 8 * MiB)
    pool.volume("image").write(0, blocks(pool, 4))
    pool.snapshot("image", "image@1")
    pool.clone("image@1", "c")
    pool.remove("image", "image@1")
    assert charged(pool, "c") == 4


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_what_is_no_limit_is_refused(limited: Pool, size: int) -> None:
    with pytest.raises(Invalid):
        limited.quota("v", size)
    with pytest.raises(Invalid):
        limited.reserve("v", size)


def test_only_volumes_have_limits_and_no_more_is_reserved_than_the_quota(limited: Pool) -> None:
    limited.snapshot("v", "s")
    for refused in (
        partial(limited.quota, "s", MiB),
        partial(limited.reserve, "s", MiB),
        partial(limited.reserve, "v", MiB),
    ):
        with pytest.raises(Invalid):
            refused()
    assert limited.show("s").quota is limited.show("s").reservation is None


# -- reservation


def test_what_is_reserved_is_there_for_its_volume_and_for_nobody_else(pools: Pools) -> None:
    pool = pools.make(size=33 * 16 * KiB, block_size=16 * KiB)
    for name in "vwx":
        pool.create(name, MiB)
    pool.volume("x").write(0, b"it has a run of blocks at hand")
    pool.reserve("v", 10 * 16 * KiB)
    assert pool.info().data_reserved == 10 * 16 * KiB
    pool.volume("w").write(0, blocks(pool, 20))
    pool.volume("x").write(16 * KiB, b"one more")
    for name in "wx":
        with pytest.raises(NoSpace, match="reserved for other volumes"):
            pool.volume(name).write(40 * 16 * KiB, b"x")
        with pytest.raises(NoSpace, match="reserved"):
            pool.volume(name).write_zeroes(40 * 16 * KiB, 16 * KiB, allocate=True)
    pool.volume("v").write(0, blocks(pool, 10))
    assert pool.allocator.free == 0 and pool.info().data_reserved == 0
    with pytest.raises(NoSpace):
        pool.volume("v").write(10 * 16 * KiB, b"x")
    pool.volume("v").trim(0, 16 * KiB)
    pool.commit()
    with pytest.raises(NoSpace, match="reserved"):
        pool.volume("w").write(40 * 16 * KiB, b"x")
    pool = pools.reopen(pool)
    with pytest.raises(NoSpace, match="reserved"):
        pool.volume("w").write(40 * 16 * KiB, b"x")
    pool.reserve("v", None)
    pool.volume("w").write(40 * 16 * KiB, b"x")


def test_a_reservation_that_the_pool_cannot_keep_is_refused(pools: Pools) -> None:
    pool = pools.make(size=33 * 16 * KiB, block_size=16 * KiB)
    pool.create("v", MiB)
    pool.create("w", MiB)
    pool.reserve("v", 20 * 16 * KiB)
    with pytest.raises(NoSpace, match=r"16 KiB are missing \(nbdthin extend"):
        pool.reserve("w", 13 * 16 * KiB)
    with pytest.raises(NoSpace), pool.batch():
        pool.create("x", MiB)
        pool.reserve("x", 13 * 16 * KiB)
    pool.reserve("w", 12 * 16 * KiB)
    pool.reserve("v", 8 * 16 * KiB)
    pool.reserve("w", 24 * 16 * KiB)
    assert [(row.name, row.reservation) for row in pool.list()] == [("v", 8 * 16 * KiB), ("w", 24 * 16 * KiB)]
    pool.remove("v")
    pool.reserve("w", 32 * 16 * KiB)


# -- growth


def test_a_file_pool_grows_at_the_threshold_up_to_its_limit(pools: Pools) -> None:
    pool = pools.make(size=40 * BLOCK, policy=Policy(min_free=0, max_size=60 * BLOCK))
    told: list[str] = []
    pool.notify = lambda kind, message, **facts: told.append(kind)
    pool.create("v", 8 * MiB)
    for block in range(31):
        pool.volume("v").write(block * BLOCK, blocks(pool, 1))
    assert pool.size == 40 * BLOCK
    pool.volume("v").write(31 * BLOCK, blocks(pool, 1))
    pool.volume("v").write(32 * BLOCK, blocks(pool, 1))
    assert pool.size == 48 * BLOCK and told == [events.EXTENDED]
    pool = pools.reopen(pool)
    assert pool.size == 48 * BLOCK == pool.data.size
    pool.volume("v").write(33 * BLOCK, blocks(pool, 26))
    assert pool.size == 60 * BLOCK and pool.allocator.free == 0
    with pytest.raises(NoSpace):
        pool.volume("v").write(59 * BLOCK, b"x")
    assert pool.volume("v").read(33 * BLOCK, 26 * BLOCK) == blocks(pool, 26)


def test_a_large_write_makes_the_pool_grow_as_often_as_it_takes(pools: Pools) -> None:
    pool = pools.make(size=16 * BLOCK, policy=GROWING)
    pool.create("v", 16 * MiB)
    pool.volume("v").write(0, blocks(pool, 100))
    pool.volume("v").write_zeroes(8 * MiB, 4 * MiB, allocate=True)
    assert pool.volume("v").read(0, 100 * BLOCK) == blocks(pool, 100)


def test_without_auto_extend_it_grows_by_hand_only(pools: Pools, eager_checkpoints: None) -> None:
    pool = pools.make(size=16 * BLOCK)
    fill(pool)
    with pytest.raises(Invalid, match="the pool has 1 MiB, it cannot shrink to 960 KiB"):
        pool.extend(15 * BLOCK)
    pool.extend(16 * BLOCK)
    pool.extend(20 * BLOCK + 5)
    assert pool.size == 20 * BLOCK
    for _ in range(3):
        pool = pools.reopen(pool)
        assert pool.info().data_total == 19 * BLOCK and len(checkpoints(pool.path)) == 1
        pool.resize("filler", pool.show("filler").size + BLOCK)
        pool.volume("filler").write(pool.show("filler").size - BLOCK, blocks(pool, 1))
    with pytest.raises(Invalid):
        pool.extend(1 << 62)
    assert pool.size == 20 * BLOCK


def test_what_the_file_system_cannot_hold_is_no_reason_to_grow(small_disk: Path, pools: Pools) -> None:
    pool = pools.make(path=small_disk / "pool", size=40 * MiB, policy=GROWING)
    pool.create("v", 80 * MiB)
    with suppress(OSError):
        for position in range(0, 80 * MiB, MiB):
            pool.volume("v").write(position, bytes([1]) * MiB)
    assert pool.size == 40 * MiB and pool.usage().free < MiB
    pool.remove("v")


def test_a_crash_after_the_file_grew_and_before_the_record_is_harmless(pools: Pools) -> None:
    pool = pools.make(size=16 * BLOCK, autocommit=False)
    pool.extend(20 * BLOCK)
    path = pools.crash(pool)
    pool = pools.open(path)
    assert pool.size == 16 * BLOCK and pool.data.size == 20 * BLOCK
    pool.extend(18 * BLOCK)
    assert pool.size == 18 * BLOCK


def test_a_pool_that_grew_finds_out_that_its_data_was_truncated(pools: Pools) -> None:
    pool = pools.make(size=16 * BLOCK)
    pool.extend(20 * BLOCK)
    path = pools.close(pool)
    os.truncate(path / "data", 19 * BLOCK)
    with pytest.raises(Invalid, match="it was truncated"):
        Pool.open(path)


@pytest.mark.parametrize("size", [8 * BLOCK, 20 * BLOCK + 1])
def test_a_size_that_cannot_be_is_damage(pools: Pools, size: int) -> None:
    pool = pools.make(size=16 * BLOCK)
    pool.journal.append(encode([Size(size)]))
    path = pools.close(pool)
    with pytest.raises(Corrupt, match="which cannot be"):
        Pool.open(path)


def test_a_device_that_became_larger_is_taken_into_use_by_hand(loop: Path, pools: Pools, tmp_path: Path) -> None:
    pool = pools.make(data=loop, size=64 * MiB, policy=GROWING)
    with pytest.raises(Invalid, match="make the device larger first"):
        pool.extend("80 MiB")
    os.truncate(tmp_path / "backing", 80 * MiB)
    run("losetup", "--set-capacity", str(loop))
    fill(pool)
    assert pool.size == 64 * MiB, "not by itself"
    pool.extend("80 MiB")
    pool.create("v", 16 * MiB)
    pool.volume("v").write(0, blocks(pool, 256))
    pool = pools.reopen(pool)
    assert pool.volume("v").read(0, 16 * MiB) == blocks(pool, 256)


# -- the file system below is full


@pytest.fixture
def ballast(small_disk: Path) -> Ballast:
    return Ballast(small_disk)


@pytest.fixture
def on_small_disk(small_disk: Path, pools: Pools) -> Pool:
    pool = pools.make(path=small_disk / "pool", size="1 GiB")
    pool.create("v", 64 * MiB)
    pool.volume("v").write(0, blocks(pool, 64))
    pool.commit()
    return pool


def use_up_segment(pool: Pool) -> None:
    """Commit until the journal is in its last segment, and its successor could not be made."""
    number = 0
    while not pool.journal_low:
        number += 1
        pool.label("v", {"padding": f"{number}" * (4000 // len(str(number)))})


def test_a_full_file_system_refuses_what_is_new_and_removes_what_is_there(
    on_small_disk: Pool, pools: Pools, ballast: Ballast
) -> None:
    pool = on_small_disk
    pool.snapshot("v", "s")
    pool.volume("v").write(0, blocks(pool, 1))
    ballast.inflate()
    use_up_segment(pool)
    for refused in (
        partial(pool.create, "x", MiB),
        partial(pool.clone, "s", "x"),
        partial(pool.snapshot, "v", "x"),
        partial(pool.label, "v", {"a": "b"}),
        partial(pool.volume("v").write, 2 * BLOCK, b"x"),
    ):
        with pytest.raises(NoSpace, match="kept for removing things"):
            refused()
    pool.volume("v").write(0, b"in place")
    pool = pools.reopen(pool)
    assert pool.volume("v").read(0, 8) == b"in place" and pool.volume("v").read(BLOCK, 4) == blocks(pool, 2)[BLOCK:][:4]
    pool.rollback("v", "s")
    pool.remove("s")
    pool.volume("v").trim(0, 64 * BLOCK)
    pool.commit()
    assert pool.journal.next_ready and not pool.journal_low, "the trim made room"
    pool.create("x", MiB)


def test_a_commit_without_room_in_the_journal_is_tried_again(
    on_small_disk: Pool, pools: Pools, ballast: Ballast
) -> None:
    pool = on_small_disk
    ballast.inflate()
    use_up_segment(pool)
    number = 0
    with pytest.raises(NoSpace, match="no room for the pool's journal"):
        while True:
            number += 1
            pool.rename("v" if number % 2 else "v2", "v2" if number % 2 else "v")
    assert pool.failed is None and pool.unwritten is not None
    sequence = pool.journal.sequence
    name = pool.list()[0].name
    pool.volume(name).write(0, b"in place")
    with pytest.raises(NoSpace):
        pool.commit()
    assert pool.journal.sequence == sequence
    ballast.deflate()
    pool.commit()
    pool.create("x", MiB)
    pool = pools.reopen(pool)
    assert [row.name for row in pool.list()] == [name, "x"]


def test_a_crash_while_a_commit_waits_for_room_loses_it_and_nothing_else(
    on_small_disk: Pool, pools: Pools, ballast: Ballast
) -> None:
    pool = on_small_disk
    ballast.inflate()
    use_up_segment(pool)
    names = ["v"]
    with suppress(NoSpace):
        while True:
            pool.rename(names[-1], f"v{len(names)}")
            names.append(f"v{len(names)}")
    path = pools.crash(pool)
    pool = pools.open(path)
    assert [row.name for row in pool.list()] == [names[-1]]
    assert pool.volume(names[-1]).read(0, BLOCK) == blocks(pool, 64)[:BLOCK]


def test_a_checkpoint_is_not_due_where_there_is_no_room_for_it(
    on_small_disk: Pool, pools: Pools, ballast: Ballast, eager_checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = on_small_disk
    pool.create("w", MiB)
    ballast.inflate()
    before = checkpoints(pool.path)
    (pool.path / "journal" / "next").unlink(missing_ok=True)
    pool.journal.next_ready = False
    ballast.inflate()
    pool.remove("w")
    pool.volume("v").write(0, b"x")
    pool.commit()
    assert pool.failed is None and checkpoints(pool.path) == before
    ballast.deflate()
    pool.create("x", MiB)
    pool = pools.reopen(pool)
    pool.create("y", MiB)
    assert checkpoints(pool.path) != before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_frame_larger_than_a_segment_that_finds_no_room_leaves_no_trace(
    pools: Pools, small_segments: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    sizes = {path: path.stat().st_size for path in logs(pool.path)}
    faults = Faults(monkeypatch, pool.journal._files, "write", code)
    with pytest.raises(NoSpace):
        pool.journal.append(encode([]) + bytes(3 * small_segments))
    faults.active = False
    assert {path: path.stat().st_size for path in sizes} == sizes
    pool.create("w", MiB)


def test_another_error_in_making_a_segment_is_final(
    pools: Pools, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.make()
    pool.journal.next_ready = False
    faults = Faults(monkeypatch, pool.journal, "_prepare", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        for _ in range(1000):
            pool.journal.append(encode([]))
    assert faults.calls == 1
    pool.fail(OSError(errno.EIO, "as the journal must not be used again"))


# -- levels


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ([0.5, 0.79, 0.8, 0.81, 0.9], [("low_water", 0.8), ("low_water", 0.9)]),
        ([0.99], [("low_water", 0.95)]),
        ([0.8, 0.79, 0.8, 0.785, 0.81], [("low_water", 0.8)]),
        ([0.81, 0.77, 0.81], [("low_water", 0.8), ("recovered", 0.8), ("low_water", 0.8)]),
        ([1.0, 0.91, 0.1], [("low_water", 0.95), ("recovered", 0.95), ("recovered", 0.8)]),
    ],
)
def test_a_level_is_told_of_once_until_usage_is_clearly_below_it(
    usage: list[float], told: list[tuple[str, float]]
) -> None:
    levels = Levels((0.8, 0.9, 0.95))
    assert [found for fraction in usage if (found := levels.update(fraction))] == told

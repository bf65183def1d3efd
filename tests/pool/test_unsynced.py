"""What survives the end of the process, though no sync covers it, and what must not survive more than that."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt, NoSpace, PoolFailed
from nbdthin.pool import unsynced
from nbdthin.pool.check import check_path
from nbdthin.pool.dump import dump, lines
from nbdthin.pool.files import Files
from nbdthin.pool.journal import Journal
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Unname
from nbdthin.units import KiB

from .conftest import BLOCK, Faults, Pools, checkpoints, flip, pattern, used


class OtherBoot(Files):
    """The machine went down and came up again."""

    def boot_id(self) -> str:
        return "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def served(pools: Pools) -> Pool:
    """A pool as a daemon opens it, with a volume `v` that is durable."""
    pool = pools.make(autocommit=False)
    pool.unsynced.start(pool.journal.sequence + 1)
    pool.create("v", 64 * BLOCK)
    pool.commit()
    return pool


def group(pool: Pool) -> Path:
    """The file that holds what has been published of the batch that is open."""
    return pool.path / "journal" / f"unsynced.{(pool.journal.sequence + 1) & 1}"


def test_what_was_published_survives_a_kill(pools: Pools, served: Pool) -> None:
    volume = served.volume("v")
    volume.write(0, pattern(3 * BLOCK))
    served.unsynced.publish()
    volume.trim(BLOCK, BLOCK)
    served.snapshot("v", "v@1")
    volume.write(5 * BLOCK + 100, b"unaligned")
    served.unsynced.publish()
    again = pools.open(pools.kill(served), autocommit=False)
    volume = again.volume("v")
    assert volume.read(0, BLOCK) == pattern(3 * BLOCK)[:BLOCK]
    assert volume.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert volume.read(5 * BLOCK + 100, 9) == b"unaligned"
    assert again.volume("v@1").read(5 * BLOCK, BLOCK) == bytes(BLOCK)


def test_what_was_recovered_is_durable_before_anything_builds_on_it(pools: Pools, served: Pool) -> None:
    """Else a block that it frees could be written by another volume, and a power cut bring the old owner back."""
    served.volume("v").write(0, pattern(BLOCK))
    served.commit()
    served.volume("v").trim(0, BLOCK)
    served.unsynced.publish()
    again = pools.open(pools.kill(served), autocommit=False)
    assert again.unwritten is None and not again._records
    pools.kill(again)
    third = Pool.open(again.path, files=OtherBoot())
    assert third.volume("v").read(0, BLOCK) == bytes(BLOCK)
    third.close()


def test_a_kill_in_the_middle_of_a_commit_loses_neither_batch(pools: Pools, served: Pool) -> None:
    volume = served.volume("v")
    for steps in range(3):
        volume.write(3 * steps * BLOCK, pattern(BLOCK, 3 * steps))
        batch = served.begin()
        volume.write((3 * steps + 1) * BLOCK, pattern(BLOCK, 3 * steps + 1))
        served.unsynced.publish()
        if steps > 0:
            batch.sync()
        if steps > 1:
            served.finish(batch)
        volume.write((3 * steps + 2) * BLOCK, pattern(BLOCK, 3 * steps + 2))
        served.unsynced.publish()
        served = pools.open(pools.kill(served), autocommit=False)
        served.unsynced.start(served.journal.sequence + 1)
        volume = served.volume("v")
        for block in range(3 * steps + 3):
            assert volume.read(block * BLOCK, BLOCK) == pattern(BLOCK, block), f"block {block} after {steps} steps"


def test_another_boot_believes_nothing_of_it(pools: Pools, served: Pool) -> None:
    """Its data may not have reached the disk."""
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.kill(served)
    with Pool.open(path, files=OtherBoot()) as again:
        assert again.volume("v").read(0, BLOCK) == bytes(BLOCK)


def test_a_pool_that_does_not_open_keeps_what_a_kill_left(pools: Pools, served: Pool) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.kill(served)
    for file in (path / "data", checkpoints(path)[0]):
        flip(file, 20)
        assert check_path(path).problems
        for inspect in (True, False):
            with pytest.raises(Corrupt):
                Pool.open(path, inspect=inspect)
        flip(file, 20)
    assert pools.open(path).volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_check_and_dump_say_what_a_kill_left(
    pools: Pools, served: Pool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    before = json.loads(json.dumps(list(lines(served.superblock, served.state))))
    served.volume("v").write(0, pattern(3 * BLOCK))
    served.snapshot("v", "s")
    served.unsynced.publish()
    path = pools.kill(served)
    report = check_path(path)
    left = f"{path / 'journal'}: answered changes that a kill left, taken over by opening: 6"
    assert (report.problems, report.notes, report.names, report.blocks) == ((), (left,), 1, 0)
    assert [json.loads(line) for line in dump(path)] == before
    assert "answered changes that a kill left are not in this dump: 6" in caplog.text
    assert check_path(path) == report
    pools.close(pools.open(path))
    assert check_path(path).notes == () and check_path(path).names == 2


def test_check_finds_what_a_kill_left_and_opening_refuses(pools: Pools, served: Pool) -> None:
    served.unsynced.add(Unname("nobody"))
    served.unsynced.publish()
    path = pools.kill(served)
    with pytest.raises(Corrupt, match="unflushed writes of a killed process cannot be read"):
        Pool.open(path)
    assert "cannot be read" in check_path(path).problems[0]
    group(served).unlink()
    pools.open(path)


def test_what_another_pool_had_answered_is_passed_over(pools: Pools, served: Pool) -> None:
    other = pools.make(autocommit=False)
    other.unsynced.start(other.journal.sequence + 1)
    other.create("v", 64 * BLOCK)
    other.commit()
    assert other.journal.sequence == served.journal.sequence
    other.volume("v").write(7 * BLOCK, pattern(BLOCK))
    other.unsynced.publish()
    path = pools.kill(served)
    shutil.copy(group(other), group(served))
    again = pools.open(path)
    assert again.volume("v").read(7 * BLOCK, BLOCK) == bytes(BLOCK) and used(again) == 0


def test_what_no_reply_promised_need_not_survive(pools: Pools, served: Pool) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    again = pools.open(pools.kill(served))
    assert again.volume("v").read(0, BLOCK) == bytes(BLOCK)


def test_a_killed_pool_syncs_what_was_written_in_place_at_the_next_flush(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    served.commit()
    served.volume("v").write(0, pattern(BLOCK, 2))  # answered; its client flushes after the restart
    again = pools.open(pools.kill(served), autocommit=False)
    syncs = Faults(monkeypatch, again.data, "sync", errno.EIO)
    with pytest.raises(PoolFailed):
        again.commit()
    assert syncs.calls == 1


def test_a_clean_end_leaves_nothing_to_recover(pools: Pools, served: Pool) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.close(served)
    assert not list(path.glob("journal/unsynced*"))
    again = pools.open(path, autocommit=False)
    assert not again.unsynced.left


def test_after_a_failed_sync_nothing_of_it_is_believed(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache may hold what the disk refused."""
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    with monkeypatch.context() as patch:
        Faults(patch, served.data, "sync", errno.EIO)
        with pytest.raises(PoolFailed):
            served.commit()
    again = pools.open(pools.kill(served))
    assert again.volume("v").read(0, BLOCK) == bytes(BLOCK)


def test_a_batch_that_grows_too_large_is_not_kept_in_part(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsynced, "MOST", 2 * KiB)
    volume = served.volume("v")
    for block in range(32):
        volume.write(block * BLOCK, pattern(KiB))
        served.unsynced.publish()
    again = pools.open(pools.kill(served), autocommit=False)
    assert again.volume("v").read(0, 32 * BLOCK) == bytes(32 * BLOCK)


def test_the_batch_behind_a_large_one_is_kept_again(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsynced, "MOST", 200)
    volume = served.volume("v")
    for block in range(2):
        volume.write(block * BLOCK, pattern(BLOCK, block))
        served.unsynced.publish()
    served.commit()
    volume.write(2 * BLOCK, pattern(BLOCK, 2))
    served.unsynced.publish()
    again = pools.open(pools.kill(served), autocommit=False)
    for block in range(3):
        assert again.volume("v").read(block * BLOCK, BLOCK) == pattern(BLOCK, block)


def test_a_full_batch_asks_once_for_a_commit(served: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsynced, "ENOUGH", KiB)
    asked = 0
    for block in range(64):
        served.volume("v").write(block * BLOCK, b"x" * 4 * KiB)
        asked += served.unsynced.publish()
    assert asked == 1


def test_a_group_that_a_kill_cut_is_as_if_it_had_not_begun(pools: Pools, served: Pool) -> None:
    volume = served.volume("v")
    volume.write(0, pattern(BLOCK))
    served.unsynced.publish()
    first = group(served).stat().st_size
    volume.write(BLOCK, pattern(BLOCK, 2))
    served.unsynced.publish()
    os.truncate(group(served), group(served).stat().st_size - 1)
    assert group(served).stat().st_size > first
    again = pools.open(pools.kill(served))
    assert again.volume("v").read(0, BLOCK) == pattern(BLOCK)
    assert again.volume("v").read(BLOCK, BLOCK) == bytes(BLOCK)


def test_damage_in_it_is_said(pools: Pools, served: Pool, caplog: pytest.LogCaptureFixture) -> None:
    for block in range(2):
        served.volume("v").write(block * BLOCK, pattern(BLOCK, block))
        served.unsynced.publish()
    flip(group(served), 60)
    path = pools.kill(served)
    again = pools.open(path)
    assert "unflushed" in caplog.text
    assert again.volume("v").read(0, 2 * BLOCK) == bytes(2 * BLOCK)


def test_a_second_kill_during_the_recovery_changes_nothing(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.kill(served)

    class Killed(Exception):
        pass

    def killed(pool: Pool) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "commit", killed)
        with pytest.raises(Killed):
            Pool.open(path)
    again = pools.open(path)
    assert again.volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_a_recovery_whose_sync_is_refused_is_not_believed_by_the_next_one(pools: Pools, served: Pool) -> None:
    """The kernel calls the data's pages clean by then: only the first sync told of it."""

    class Refusing(Files):
        def sync(self, fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("/data"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().sync(fd)

    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.kill(served)
    with pytest.raises(PoolFailed):
        Pool.open(path, files=Refusing())
    again = pools.open(path)
    assert again.volume("v").read(0, BLOCK) == bytes(BLOCK)


def test_two_batches_that_a_kill_left_are_recovered_whenever_the_next_kill_comes(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They become the frames that they were noted for, so nothing is applied twice."""
    served.create("w", BLOCK)
    served.commit()
    served.volume("v").write(0, pattern(BLOCK))
    served.begin()
    served.remove("w")
    served.unsynced.publish()
    path = pools.kill(served)

    class Killed(Exception):
        pass

    real, commits = Pool.commit, 0

    def killed(pool: Pool) -> None:
        nonlocal commits
        if commits == stop:
            raise Killed
        commits += 1
        real(pool)

    for stop in range(3):
        commits = 0
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "commit", killed)
            if stop < 2:
                with pytest.raises(Killed):
                    Pool.open(path)
    again = pools.open(path)
    assert [row.name for row in again.list()] == ["v"]
    assert again.volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_a_checkpoint_that_is_due_waits_for_all_that_a_kill_left(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would show what the second batch has done, which is told again behind it, of layers that are gone by then."""
    served.create("w", BLOCK)
    served.commit()
    served.volume("v").write(0, pattern(64 * BLOCK))
    served.begin()
    served.volume("w").write(0, pattern(BLOCK))
    served.remove("w")
    served.unsynced.publish()
    path = pools.kill(served)
    monkeypatch.setattr("nbdthin.pool.pool.CHECKPOINT_JOURNAL", 0)
    before = checkpoints(path)
    recovered = pools.open(path, autocommit=False)
    assert checkpoints(path) != before
    again = pools.open(pools.kill(recovered))
    assert [row.name for row in again.list()] == ["v"]
    assert again.volume("v").read(0, 64 * BLOCK) == pattern(64 * BLOCK)


def test_a_recovery_without_room_for_the_journal_loses_nothing(pools: Pools, served: Pool) -> None:
    served.volume("v").write(0, pattern(BLOCK))
    served.unsynced.publish()
    path = pools.kill(served)

    def no_room(journal: Journal, payload: bytes) -> None:
        raise NoSpace("no room")

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "append", no_room)
            with pytest.raises(NoSpace):
                Pool.open(path)
    again = pools.open(path)
    assert again.volume("v").read(0, BLOCK) == pattern(BLOCK)


def test_a_file_system_without_room_costs_the_protection_and_nothing_else(
    pools: Pools, served: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(served.unsynced._files, "write", _no_space)
        served.volume("v").write(0, pattern(BLOCK))
        assert served.unsynced.publish() is True  # a commit is due
    served.volume("v").write(BLOCK, pattern(BLOCK, 2))
    served.unsynced.publish()
    served.commit()
    again = pools.open(pools.kill(served))
    assert again.volume("v").read(0, 2 * BLOCK) == pattern(BLOCK) + pattern(BLOCK, 2)


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

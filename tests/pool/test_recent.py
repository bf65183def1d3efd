"""What was answered outlives the process. A killed one is a pool that is let go of without a commit: its files stay."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from nbdthin.errors import Corrupt
from nbdthin.pool import recent
from nbdthin.pool.check import check
from nbdthin.pool.pool import Pool
from nbdthin.units import KiB, MiB

BLOCK = 64 * KiB


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool, whose notes are in `tmp_path`."""
    monkeypatch.setattr(recent.Recent.__init__, "__defaults__", (tmp_path,))
    Pool.init(tmp_path / "pool", size="64 MiB")
    return tmp_path / "pool"


@pytest.fixture
def pool(path: Path) -> Iterator[Pool]:
    pool = opened(path)
    pool.create("a", 8 * MiB)
    pool.commit()
    yield pool
    with opened(path) as again:
        assert check(again) == []


def opened(path: Path) -> Pool:
    return Pool.open(path, autocommit=False, notes=True)


def kill(pool: Pool) -> None:
    """As the kernel lets go of what a killed process had open."""
    pool.journal.close()
    pool.data.close()
    os.close(pool._lock)


def notes(path: Path) -> list[Path]:
    return sorted(path.parent.glob("nbdthin-*"))


def current(pool: Pool) -> Path:
    """The file with the notes for the frame that the journal has not yet."""
    number = struct.pack("<Q", pool.journal.sequence + 1)
    return next(file for file in notes(pool.path) if file.read_bytes()[32:40] == number)


def test_what_was_noted_is_there_after_a_kill_and_what_was_not_is_gone(pool: Pool) -> None:
    volume = pool.volume("a")
    volume.write(0, b"n" * BLOCK)
    volume.write(4 * MiB, b"n" * 4096)
    volume.trim(0, 4096)
    pool.note()
    volume.write(2 * MiB, b"g" * 4096)
    kill(pool)
    with opened(pool.path) as again:
        volume = again.volume("a")
        assert volume.read(0, BLOCK) == bytes(4096) + b"n" * (BLOCK - 4096)
        assert volume.read(4 * MiB, 4096) == b"n" * 4096
        assert volume.read(2 * MiB, 4096) == bytes(4096)
        assert again.allocator.used == 2


def test_what_was_recovered_is_durable_before_anyone_is_served(pool: Pool) -> None:
    pool.volume("a").write(0, b"n" * 4096)
    pool.note()
    kill(pool)
    again = opened(pool.path)
    kill(again)
    with Pool.open(pool.path) as without:
        assert without.volume("a").read(0, 4096) == b"n" * 4096


def test_commands_and_merges_are_noted_in_their_order(pool: Pool) -> None:
    volume = pool.volume("a")
    volume.write(0, b"1" * BLOCK)
    pool.snapshot("a", "a@1")
    volume.write(4096, b"2" * 4096)
    pool.commit()
    pool.remove("a@1")
    pool.commit()
    pool.merge_all()
    pool.create("b", MiB)
    pool.volume("b").write(0, b"b" * 4096)
    pool.snapshot("b", "b@1")
    volume.write(8192, b"3" * 4096)
    pool.resize("a", MiB)
    pool.note()
    kill(pool)
    with opened(pool.path) as again:
        assert [row.name for row in again.list()] == ["a", "b", "b@1"]
        expected = b"1" * 4096 + b"2" * 4096 + b"3" * 4096 + b"1" * (BLOCK - 12288)
        assert again.volume("a").read(0, BLOCK) == expected
        assert again.volume("b@1").read(0, 4096) == b"b" * 4096
        assert check(again) == []


@pytest.mark.parametrize("appended", [False, True])
def test_a_kill_during_a_commit_loses_neither_its_batch_nor_the_next(pool: Pool, appended: bool) -> None:
    volume = pool.volume("a")
    volume.write(0, b"1" * 4096)
    batch = pool.begin()
    volume.write(BLOCK, b"2" * 4096)
    volume.trim(0, 4096)
    pool.note()
    if appended:
        batch.sync()
    kill(pool)
    with opened(pool.path) as again:
        assert again.volume("a").read(0, 4096) == bytes(4096)
        assert again.volume("a").read(BLOCK, 4096) == b"2" * 4096


def test_many_batches_leave_no_more_than_the_last_in_the_files(pool: Pool) -> None:
    for number in range(100):
        pool.volume("a").write(number * BLOCK, b"x" * 4096)
        pool.commit()
    assert sum(file.stat().st_size for file in notes(pool.path)) < 200
    kill(pool)


def test_a_note_that_is_not_whole_was_answered_to_nobody(pool: Pool) -> None:
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    pool.volume("a").write(BLOCK, b"2" * 4096)
    pool.note()
    kill(pool)
    file = current(pool)
    os.truncate(file, file.stat().st_size - 1)
    with opened(pool.path) as again:
        assert again.volume("a").read(0, 4096) == b"1" * 4096
        assert again.volume("a").read(BLOCK, 4096) == bytes(4096)


def test_whoever_opens_the_pool_in_between_ends_the_session(pool: Pool) -> None:
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    kill(pool)
    with Pool.open(pool.path) as other:
        other.create("b", MiB)
        other.remove("a")
        other.create("a", 8 * MiB)
    with opened(pool.path) as again:
        assert again.volume("a").read(0, 4096) == bytes(4096)


def test_looking_at_the_pool_changes_no_session(pool: Pool) -> None:
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    kill(pool)
    Pool.open(pool.path, inspect=True).close()
    with opened(pool.path) as again:
        assert again.volume("a").read(0, 4096) == b"1" * 4096


def test_a_close_and_a_failure_leave_no_notes(path: Path) -> None:
    with opened(path) as pool:
        pool.create("a", MiB)
        assert len(notes(path)) == 2
    assert notes(path) == []
    pool = opened(path)
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    pool.fail(OSError(errno.EIO, "made up"))
    assert notes(path) == []
    kill(pool)
    with opened(path) as again:
        assert again.volume("a").read(0, 4096) == bytes(4096), "bytes that may be lost are not given a name"


def test_notes_that_others_may_have_written_are_ignored(pool: Pool) -> None:
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    kill(pool)
    for file in notes(pool.path):
        file.chmod(0o666)
    with opened(pool.path) as again:
        assert again.volume("a").read(0, 4096) == bytes(4096)


def test_where_there_can_be_no_notes_work_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recent.Recent.__init__, "__defaults__", (path.parent / "nowhere",))
    with opened(path) as pool:
        pool.create("a", MiB)
        pool.volume("a").write(0, b"1" * 4096)
        pool.note()
        assert pool.recent is not None and not pool.recent.puts
    assert "a killed daemon loses what was not flushed" in caplog.text
    with opened(path) as again:
        assert again.volume("a").read(0, 4096) == b"1" * 4096


def test_notes_that_make_no_sense_are_named(pool: Pool) -> None:
    (layer,) = pool.state.layers.values()
    pool.volume("a").write(0, b"1" * 4096)
    pool.note()
    kill(pool)
    file = current(pool)
    whole = file.read_bytes()
    payload = msgpack.packb([(3, "no such name")])
    body = struct.pack("<II", 1, len(payload)) + payload
    note = struct.pack("<IIQ", len(body), zlib.crc32(body), pool.journal.sequence + 1) + body
    file.write_bytes(whole[:24] + note)
    with pytest.raises(Corrupt, match="remove it to go on with what was flushed"):
        opened(pool.path)
    file.write_bytes(whole)
    with opened(pool.path) as again:
        assert again.state.layers.keys() == {layer.number}


def test_every_byte_of_a_note_is_as_documented(pool: Pool) -> None:
    (layer,) = pool.state.layers.values()
    pool.volume("a").write(3 * BLOCK, b"1" * 4096)
    entry = layer.entry(3)
    pool.create("b", MiB)
    pool.note()
    kill(pool)
    data = current(pool).read_bytes()
    assert data[:8] == b"NBTRcnt1" and data[8:24] == (pool.path / "lock").read_bytes()
    length, crc, number = struct.unpack_from("<IIQ", data, 24)
    assert (length, crc, number) == (len(data) - 40, zlib.crc32(data[40:]), pool.journal.sequence + 1)
    assert struct.unpack_from("<IIQQQ", data, 40) == (0, 24, layer.number, 3, entry)
    kind, size = struct.unpack_from("<II", data, 72)
    assert kind == 1 and msgpack.unpackb(data[80 : 80 + size])[0][0] in (1, 2)

"""Frames and files of the journal: what is read back after a cut, a flip, a rotation and every step of a checkpoint."""

from __future__ import annotations

import errno
import shutil
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt
from nbdthin.pool import journal as journal_module
from nbdthin.pool.check import check
from nbdthin.pool.journal import HEADER, Frame, Journal, frame, mark, parse_frame
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import BadRecord, Layer, Name, decode, encode
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, LEAF, Pools, checkpoints, contents, fill, flip, frames, logs, pattern

FIRST = b"the checkpoint"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A journal of opaque payloads: frames 1 to 3 behind a checkpoint."""
    path = tmp_path / "journal"
    Journal.create(path, FIRST)
    append(path, b"one", b"two" * 7, b"three")
    return path


def load(directory: Path, *, repair_tail: bool = False) -> list[bytes]:
    """The payloads that recovery hands out."""
    payloads: list[bytes] = []
    journal = Journal(directory)
    try:
        journal.load(lambda item: payloads.append(item.payload), repair_tail=repair_tail)
    finally:
        journal.close()
    return payloads


def append(directory: Path, *payloads: bytes) -> Journal:
    journal = Journal(directory)
    journal.load(lambda _: None)
    for payload in payloads:
        journal.append(payload)
    journal.close()
    return journal


def unmark(path: Path) -> None:
    """Take the mark from behind the last frame: as a power cut does that comes before the kernel has written it."""
    with open(path, "r+b") as file:
        file.seek(frames(path)[-1][1])
        file.write(bytes(HEADER.size))


def segment(directory: Path) -> Path:
    return sorted(directory.glob("*.log"))[-1]


# -- the bytes


def test_a_frame_is_what_format_md_says() -> None:
    made = frame(0x0102030405060708, b"payload")
    magic, version, reserved, sequence, length, payload_crc, header_crc = struct.unpack_from("<4sHHQIII", made)
    assert (magic, version, reserved, sequence, length) == (b"NBTJ", 1, 0, 0x0102030405060708, 7)
    assert payload_crc == zlib.crc32(b"payload")
    assert header_crc == zlib.crc32(made[:24])
    assert made[28:] == b"payload"
    assert made.hex() == "4e42544a01000000080706050403020107000000156a2c42384aed6d7061796c6f6164"


def test_a_new_journal_is_a_checkpoint_and_a_segment_of_zeroes(tmp_path: Path) -> None:
    Journal.create(tmp_path / "journal", FIRST)
    assert (tmp_path / "journal" / "0000000000000001.checkpoint").read_bytes() == frame(1, FIRST)
    data = (tmp_path / "journal" / "0000000000000001.log").read_bytes()
    assert data == bytes(4 * MiB)


def test_frames_stand_one_behind_the_other_with_zeroes_to_the_end(directory: Path) -> None:
    data = segment(directory).read_bytes()
    written = frame(1, b"one") + frame(2, b"two" * 7) + frame(3, b"three") + mark(3)
    assert data == written.ljust(4 * MiB, b"\0")


def test_a_mark_is_the_header_of_a_frame_without_payload() -> None:
    body = struct.pack("<4sHHQII", b"NBTJ", 1, 1, 7, 0, 0)
    assert mark(7) == body + zlib.crc32(body).to_bytes(4, "little")


def test_an_append_changes_no_file_size(directory: Path) -> None:
    before = segment(directory).stat().st_size
    append(directory, bytes(1000))
    assert segment(directory).stat().st_size == before


# -- what is read back


def test_payloads_come_back_in_order_behind_the_checkpoint(directory: Path) -> None:
    assert load(directory) == [FIRST, b"one", b"two" * 7, b"three"]


def test_recovery_says_where_each_frame_is(directory: Path) -> None:
    found: list[Frame] = []
    Journal(directory).load(found.append, repair_tail=False)
    assert [(item.sequence, item.path.name, item.offset) for item in found] == [
        (1, "0000000000000001.checkpoint", 0),
        (1, "0000000000000001.log", 0),
        (2, "0000000000000001.log", 31),
        (3, "0000000000000001.log", 31 + 49),
    ]


def test_an_empty_payload_is_a_frame_like_any_other(directory: Path) -> None:
    append(directory, b"", b"behind it")
    assert load(directory)[-2:] == [b"", b"behind it"]


# -- a torn tail


def test_a_journal_torn_at_any_byte_of_its_last_frame_reads_as_before_it(directory: Path) -> None:
    path = segment(directory)
    data = path.read_bytes()
    start, end = frames(path)[-1]
    for cut in range(start, end):
        path.write_bytes(data[:cut].ljust(len(data), b"\0"))
        assert load(directory) == [FIRST, b"one", b"two" * 7], f"cut at byte {cut}"


def test_a_segment_that_was_cut_off_is_refused_with_its_place(directory: Path) -> None:
    """It has the size it was made with as long as it lives: not even a power cut makes it shorter."""
    path = segment(directory)
    data = path.read_bytes()
    for cut in (0, frames(path)[-1][0], frames(path)[-1][1] - 1, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(Corrupt, match="cut off") as caught:
            load(directory, repair_tail=True)
        assert (caught.value.path, caught.value.offset) == (path, cut)


def test_a_torn_tail_is_overwritten_and_the_segment_keeps_its_size(directory: Path) -> None:
    path = segment(directory)
    size = path.stat().st_size
    end = frames(path)[-1][1]
    with open(path, "r+b") as file:
        file.seek(end + 100)
        file.write(b"torn")
    append(directory)
    assert path.stat().st_size == size
    assert path.read_bytes()[end:] == mark(3).ljust(size - end, b"\0")


@pytest.mark.parametrize("damage", [b"not blank", b""])
def test_a_next_segment_that_is_not_blank_is_made_anew(tmp_path: Path, small_segments: int, damage: bytes) -> None:
    path = tmp_path / "journal"
    Journal.create(path, FIRST)
    whole = bytes(small_segments)
    (path / "next").write_bytes(damage + whole[len(damage) :] if damage else damage)
    append(path, *(bytes([number]) * KiB for number in range(1, 5)))
    assert load(path) == [FIRST, *(bytes([number]) * KiB for number in range(1, 5))]


def test_what_is_appended_behind_a_torn_tail_is_read_back(directory: Path) -> None:
    path = segment(directory)
    data = path.read_bytes()
    start, end = frames(path)[-1]
    for cut in range(start, end, 5):
        shutil.rmtree(directory)
        Journal.create(directory, FIRST)
        path.write_bytes(data[:cut].ljust(len(data), b"\0"))
        append(directory, b"another third", b"fourth")
        assert load(directory) == [FIRST, b"one", b"two" * 7, b"another third", b"fourth"], f"cut at byte {cut}"


def test_the_first_frame_of_a_segment_can_be_the_torn_one(tmp_path: Path) -> None:
    Journal.create(tmp_path / "journal", FIRST)
    with open(segment(tmp_path / "journal"), "r+b") as file:
        file.write(frame(1, b"one")[:-1])
    append(tmp_path / "journal", b"one again", b"two")
    assert load(tmp_path / "journal") == [FIRST, b"one again", b"two"]


def test_a_torn_tail_whose_header_never_arrived_is_cut(directory: Path) -> None:
    path = segment(directory)
    start, _ = frames(path)[-1]
    unmark(path)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(HEADER.size))
    assert load(directory) == [FIRST, b"one", b"two" * 7]


def test_a_frame_torn_over_the_mark_of_the_frame_before_it_is_cut(directory: Path) -> None:
    """Its first sector, and with it the old mark, stayed as it was: what is behind the mark was never acknowledged."""
    path = segment(directory)
    end = frames(path)[-1][1]
    torn = frame(4, bytes(range(1, 256)) * 4)
    with open(path, "r+b") as file:
        file.seek(end + HEADER.size)
        file.write(torn[HEADER.size :])
    append(directory, b"another four")
    assert load(directory) == [FIRST, b"one", b"two" * 7, b"three", b"another four"]


@pytest.mark.parametrize("place", ["header", "behind"])
def test_what_no_torn_append_leaves_is_refused(directory: Path, place: str) -> None:
    """The sector with the header was written whole or not at all, and nothing was written behind the frame."""
    path = segment(directory)
    unmark(path)
    start, end = frames(path)[-1]
    flip(path, start + 5 if place == "header" else end - 1)
    if place == "behind":
        flip(path, end + 600)
    with pytest.raises(Corrupt, match="not what a torn append leaves") as caught:
        load(directory)
    assert caught.value.offset == start


def test_a_damaged_mark_alone_matters_to_nobody(directory: Path) -> None:
    path = segment(directory)
    for offset in range(frames(path)[-1][1], frames(path)[-1][1] + HEADER.size):
        flip(path, offset)
        assert load(directory)[-1] == b"three"
        flip(path, offset)


def test_a_check_does_not_cut_the_torn_tail(directory: Path) -> None:
    path = segment(directory)
    unmark(path)
    flip(path, frames(path)[-1][1] - 1)
    before = path.read_bytes()
    load(directory, repair_tail=False)
    assert path.read_bytes() == before


def test_a_sound_frame_of_another_version_is_refused_not_cut(directory: Path) -> None:
    """It was written whole: by a later nbdthin, which acknowledged it."""
    path = segment(directory)
    end = frames(path)[-1][1]
    for version, reserved in ((2, 0), (1, 3)):
        body = struct.pack("<4sHHQII", b"NBTJ", version, reserved, 4, 4, zlib.crc32(b"four"))
        with open(path, "r+b") as file:
            file.seek(end)
            file.write(body + zlib.crc32(body).to_bytes(4, "little") + b"four")
        with pytest.raises(Corrupt) as caught:
            load(directory)
        assert caught.value.offset == end


# -- damage


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "last, marked as durable"])
def test_a_flipped_byte_with_a_sound_frame_behind_it_is_refused_with_its_place(directory: Path, number: int) -> None:
    path = segment(directory)
    start, end = frames(path)[number]
    for offset in range(start, end):
        flip(path, offset)
        with pytest.raises(Corrupt) as caught:
            load(directory, repair_tail=True)
        assert (caught.value.path, caught.value.offset) == (path, start), f"flipped at byte {offset}"
        flip(path, offset)
    assert load(directory) == [FIRST, b"one", b"two" * 7, b"three"]


def test_a_single_flipped_bit_of_a_length_is_not_taken_for_the_end(directory: Path) -> None:
    path = segment(directory)
    start, _ = frames(path)[0]
    for bit in range(32):
        flip(path, start + 16 + bit // 8, 1 << bit % 8)
        with pytest.raises(Corrupt):
            load(directory)
        flip(path, start + 16 + bit // 8, 1 << bit % 8)


def test_a_flipped_byte_of_a_checkpoint_is_refused_with_its_place(directory: Path) -> None:
    path = directory / "0000000000000001.checkpoint"
    for offset in range(path.stat().st_size):
        flip(path, offset)
        with pytest.raises(Corrupt) as caught:
            load(directory, repair_tail=True)
        assert (caught.value.path, caught.value.offset) == (path, 0)
        flip(path, offset)


def cut_checkpoint(directory: Path) -> None:
    path = directory / "0000000000000001.checkpoint"
    path.write_bytes(path.read_bytes()[:-1])


def empty_checkpoint(directory: Path) -> None:
    (directory / "0000000000000001.checkpoint").write_bytes(b"")


def no_checkpoint(directory: Path) -> None:
    (directory / "0000000000000001.checkpoint").unlink()


def no_segment(directory: Path) -> None:
    segment(directory).unlink()


def renamed_checkpoint(directory: Path) -> None:
    (directory / "0000000000000001.checkpoint").rename(directory / "0000000000000002.checkpoint")


def frame_wiped_out(directory: Path) -> None:
    path = segment(directory)
    start, end = frames(path)[1]
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))


def frame_repeated(directory: Path) -> None:
    path = segment(directory)
    start, end = frames(path)[-1]
    with open(path, "r+b") as file:
        file.seek(end)
        file.write(path.read_bytes()[start:end])


def frame_left_out(directory: Path) -> None:
    path = segment(directory)
    with open(path, "r+b") as file:
        file.seek(frames(path)[-1][1])
        file.write(frame(5, b"five"))


@pytest.mark.parametrize(
    "damage",
    [
        cut_checkpoint,
        empty_checkpoint,
        no_checkpoint,
        no_segment,
        renamed_checkpoint,
        frame_wiped_out,
        frame_repeated,
        frame_left_out,
    ],
)
def test_damage_is_refused_and_changes_nothing(directory: Path, damage: Callable[[Path], None]) -> None:
    damage(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(Corrupt) as caught:
        load(directory, repair_tail=True)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


# -- segments


@pytest.fixture
def rotated(tmp_path: Path, small_segments: int) -> Path:
    """Twelve frames of 1 KiB in four segments."""
    path = tmp_path / "journal"
    Journal.create(path, FIRST)
    append(path, *(bytes([number]) * KiB for number in range(1, 13)))
    return path


def test_a_full_segment_is_followed_by_another(rotated: Path) -> None:
    assert [path.name for path in sorted(rotated.glob("*.log"))] == [f"{number:016x}.log" for number in (1, 4, 7, 10)]
    assert load(rotated) == [FIRST, *(bytes([number]) * KiB for number in range(1, 13))]


def test_appending_goes_on_in_the_last_segment(rotated: Path) -> None:
    append(rotated, b"13")
    append(rotated, b"14")
    assert load(rotated)[-2:] == [b"13", b"14"]


def test_a_frame_larger_than_a_segment_has_one_to_itself(rotated: Path) -> None:
    large = pattern(64 * KiB)
    append(rotated, large, b"behind")
    assert load(rotated)[-2:] == [large, b"behind"]


def test_the_prepared_segment_is_the_one_that_follows(tmp_path: Path, small_segments: int) -> None:
    path = tmp_path / "journal"
    Journal.create(path, FIRST)
    journal = Journal(path)
    journal.load(lambda _: None)
    journal.prepare_next()
    inode = (path / "next").stat().st_ino
    for number in range(4):
        journal.append(bytes(KiB) + bytes([number]))
    journal.close()
    assert segment(path).stat().st_ino == inode
    assert segment(path).stat().st_size == small_segments


def test_a_missing_segment_between_others_is_refused(rotated: Path) -> None:
    (rotated / f"{7:016x}.log").unlink()
    with pytest.raises(Corrupt, match="frames 7 to 9 are missing"):
        load(rotated)


def test_a_damaged_last_frame_of_an_earlier_segment_is_refused(rotated: Path) -> None:
    path = rotated / f"{4:016x}.log"
    start, end = frames(path)[-1]
    flip(path, end - 1)
    with pytest.raises(Corrupt) as caught:
        load(rotated, repair_tail=True)
    assert (caught.value.path, caught.value.offset) == (path, start)


def test_a_wiped_last_frame_of_an_earlier_segment_is_refused(rotated: Path) -> None:
    path = rotated / f"{4:016x}.log"
    start, end = frames(path)[-1]
    for wiped, what in ((end, "durable"), (end + HEADER.size, "missing")):
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(bytes(wiped - start))
        with pytest.raises(Corrupt, match=what):
            load(rotated)


def test_a_lost_last_segment_is_missed(rotated: Path) -> None:
    segment(rotated).unlink()
    with pytest.raises(Corrupt, match="log is missing"):
        load(rotated)


def test_a_crash_just_behind_a_rotation_loses_nothing(rotated: Path, small_segments: int) -> None:
    (rotated / f"{13:016x}.log").write_bytes(bytes(small_segments))
    assert load(rotated)[-1] == bytes([12]) * KiB
    append(rotated, b"13")
    assert load(rotated)[-1] == b"13"


# -- checkpoints


def test_a_checkpoint_takes_the_place_of_what_is_before_it(rotated: Path) -> None:
    journal = Journal(rotated)
    journal.load(lambda _: None)
    number = journal.start_segment()
    journal.append(b"behind the checkpoint")
    journal.write_checkpoint(number, [b"all", b"of it"])
    journal.finish_checkpoint(number)
    journal.close()
    assert number == 13
    assert sorted(path.name for path in rotated.glob("*.*")) == [f"{13:016x}.checkpoint", f"{13:016x}.log"]
    assert load(rotated) == [b"all", b"of it", b"behind the checkpoint"]


def step_started(journal: Journal) -> None:
    journal.start_segment()


def step_half_written(journal: Journal) -> None:
    number = journal.start_segment()
    (journal.directory / f"{number:016x}.checkpoint.new").write_bytes(frame(number, b"all")[:-1])


def step_written_whole(journal: Journal) -> None:
    number = journal.start_segment()
    (journal.directory / f"{number:016x}.checkpoint.new").write_bytes(frame(number, b"all"))


@pytest.mark.parametrize("step", [step_started, step_half_written, step_written_whole])
def test_a_crash_before_the_checkpoint_is_in_place_reads_the_frames(
    rotated: Path, step: Callable[[Journal], None]
) -> None:
    journal = Journal(rotated)
    journal.load(lambda _: None)
    step(journal)
    journal.append(b"13")
    journal.close()
    assert load(rotated, repair_tail=True) == [FIRST, *(bytes([number]) * KiB for number in range(1, 13)), b"13"]
    assert not list(rotated.glob("*.new"))
    append(rotated, b"14")
    assert load(rotated)[-1] == b"14"


@pytest.mark.parametrize("left", [(), (1,), (1, 4), (1, 4, 7), (1, 4, 7, 10), (10,)])
@pytest.mark.parametrize("both", [False, True], ids=["one checkpoint", "both checkpoints"])
def test_a_crash_while_old_files_are_removed_reads_the_checkpoint(
    rotated: Path, tmp_path: Path, left: tuple[int, ...], both: bool
) -> None:
    before = shutil.copytree(rotated, tmp_path / "before")
    journal = Journal(rotated)
    journal.load(lambda _: None)
    number = journal.start_segment()
    journal.write_checkpoint(number, [b"all"])
    journal.finish_checkpoint(number)
    journal.append(b"13")
    journal.close()
    for first in left:
        shutil.copy(before / f"{first:016x}.log", rotated)
    if both:
        shutil.copy(before / f"{1:016x}.checkpoint", rotated)
    assert load(rotated, repair_tail=True) == [b"all", b"13"]
    assert sorted(path.name for path in rotated.glob("*.*")) == [f"{13:016x}.checkpoint", f"{13:016x}.log"]


def test_a_checkpoint_of_a_journal_without_frames_keeps_its_segment(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal.create(path, FIRST)
    journal = Journal(path)
    journal.load(lambda _: None)
    number = journal.start_segment()
    journal.write_checkpoint(number, [b"all"])
    journal.finish_checkpoint(number)
    journal.append(b"one")
    journal.close()
    assert load(path) == [b"all", b"one"]


# -- the journal of a pool


def test_a_pool_torn_at_any_byte_of_its_last_frame_opens_as_before_it(pools: Pools) -> None:
    pool = pools.make()
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.snapshot("a", "s")
    before = contents(pool), [row.name for row in pool.list()], pool.allocator.used
    pool.volume("a").write(0, pattern(5 * KiB, 2))
    pool.clone("s", "b")
    path = logs(pools.close(pool))[-1]
    whole = path.read_bytes()
    start, end = frames(path)[-1]
    for cut in range(start, start + len(whole[start:end].rstrip(b"\0"))):
        path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
        pool = pools.open(pool.path)
        assert (contents(pool), [row.name for row in pool.list()], pool.allocator.used) == before
        pools.crash(pool)
    path.write_bytes(whole)
    assert [row.name for row in pools.open(pool.path).list()] == ["a", "b", "s"]


def test_a_damaged_frame_of_a_pool_is_refused_by_file_and_byte(pools: Pools) -> None:
    pool = pools.make()
    for name in "abc":
        pool.create(name, MiB)
    path = logs(pools.close(pool))[-1]
    start, end = frames(path)[1]
    for offset in range(start, end):
        flip(path, offset)
        with pytest.raises(Corrupt) as caught:
            Pool.open(pool.path)
        assert (caught.value.path, caught.value.offset) == (path, start)
        assert f"{path} at byte {start}" in str(caught.value)
        flip(path, offset)
    assert len(pools.open(pool.path).list()) == 3


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91\x92\x63\x01",  # a record with tag 99
        b"\xc1",  # not msgpack
        b"\x01",  # not a list
        b"\x91\x01",  # not a list of records
        b"\x91\x92\x01\x05",  # a layer without its parent
        encode([Layer(7, 6)]),  # a parent that is not there
        encode([Name("x", False, 9, 512, 0.0, {})]),  # a layer that is not there
        b"\x91\x94\x04\x01\xc4\x03abc\xc4\x00",  # entries of three bytes
        b"\x91\x94\x05\x01\x00\xc4\x03abc",  # a leaf of three bytes
        b"\x91\x94\x04\x01\xa1x\xa1y",  # entries that are text
        b"\x91\x93\x01\xa1x\x00",  # a layer whose number is text
    ],
    ids=str,
)
def test_a_sound_frame_with_a_record_this_version_does_not_know_is_refused(pools: Pools, payload: bytes) -> None:
    pool = pools.make()
    pool.create("a", MiB)
    pool.journal.append(payload)
    path = logs(pools.crash(pool))[-1]
    with pytest.raises(Corrupt) as caught:
        Pool.open(pool.path)
    assert (caught.value.path, caught.value.offset) == (path, frames(path)[-1][0])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_between_two_frames_is_refused(
    pools: Pools, eager_checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdthin.pool.pool._CHECKPOINT_FRAME", 4 * KiB)
    pool = pools.make(size="1G", autocommit=False)
    pool.create("a", "1G")
    for leaf in range(4):
        pool.volume("a").write(leaf * 512 * BLOCK, pattern(BLOCK))
    pool.commit()
    path = checkpoints(pools.close(pool))[-1]
    whole = path.read_bytes()
    ends = [end for _, end in frames(path)]
    assert len(ends) > 4
    for end in ends[:-1]:
        path.write_bytes(whole[:end])
        with pytest.raises(Corrupt, match=r"checkpoint"):
            Pool.open(pool.path)
    path.write_bytes(whole)
    pools.open(pool.path)


@pytest.mark.parametrize("eager", [0, 2000])
def test_a_pool_lives_through_many_checkpoints_and_rotations(
    pools: Pools, small_segments: int, monkeypatch: pytest.MonkeyPatch, eager: int
) -> None:
    monkeypatch.setattr("nbdthin.pool.pool.CHECKPOINT_JOURNAL", eager)
    pool = pools.make()
    pool.create("a", MiB)
    for turn in range(30):
        pool.volume("a").write(turn % 16 * BLOCK, pattern(6 * KiB, turn))
        pool.snapshot("a", f"s{turn}")
        if turn > 3:
            pool.remove(f"s{turn - 3}")
        if turn % 9 == 8:
            pool = pools.reopen(pool)
    assert len(checkpoints(pool.path)) == 1
    assert int(checkpoints(pool.path)[0].stem, 16) > 20


def test_a_layer_without_a_name_in_a_checkpoint_is_still_merged_later(pools: Pools, eager_checkpoints: None) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.snapshot("a", "s")
    pool.volume("a").write(0, pattern(BLOCK, 2))
    pool.remove("s")
    pool.journal.checkpoint_bytes = 0
    pool.commit()
    assert [record for path in checkpoints(pool.path) for record in decode(parse(path)) if isinstance(record, Layer)]
    pool = pools.reopen(pool)
    pool.merge_all()
    assert (len(pool.state.layers), pool.allocator.used) == (1, 1)


def parse(path: Path) -> bytes:
    found = parse_frame(path.read_bytes(), 0)
    assert found is not None
    return found[1]


def test_a_checkpoint_that_cannot_be_written_costs_nothing(
    pools: Pools, eager_checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pool.journal, "write_checkpoint", full)
        pool.create("a", MiB)
        pool.create("b", MiB)
    assert pool.failed is None
    assert [path.name for path in checkpoints(pool.path)] == ["0000000000000001.checkpoint"]
    again = pools.reopen(pool)
    assert [row.name for row in again.list()] == ["a", "b"]


def test_a_background_checkpoint_holds_nothing_that_came_after_its_batch(pools: Pools) -> None:
    """Its leaves are those of the moment, though merging hands a sealed layer's leaf to a head that writes into it."""
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.snapshot("a", "s")
    pool.commit()
    pool.remove("s")
    pool.journal.bytes_since_checkpoint = 1 << 40
    batch = pool.begin()
    assert batch.checkpoint_due
    batch.sync()
    pool.finish(batch)
    assert batch._capture is not None
    expected = list(batch._capture.payloads())
    pool.merge_all()
    pool.volume("a").write(BLOCK, pattern(BLOCK, 2))
    assert list(batch._capture.payloads()) == expected
    batch.write_checkpoint()
    pool.checkpoint_ended(None)


def test_a_background_checkpoint_does_not_follow_a_volume_that_is_written_meanwhile(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.journal.bytes_since_checkpoint = 1 << 40
    batch = pool.begin()
    assert batch.checkpoint_due
    batch.sync()
    pool.volume("a").write(BLOCK, pattern(BLOCK, 2))
    batch.write_checkpoint()
    pool.finish(batch)
    pool.checkpoint_ended(None)
    again = pools.open(pools.crash(pool))
    assert again.allocator.used == 1, "nothing points to data that was never synced"
    assert again.volume("a").read(0, 2 * BLOCK) == pattern(BLOCK) + bytes(BLOCK)


@pytest.mark.parametrize("parent", [False, True])
def test_a_leaf_that_a_checkpoint_holds_is_copied_by_who_changes_it(pools: Pools, parent: bool) -> None:
    """Once, and by whoever can change one: a write, a trim, a whole leaf. The others stay the same object."""
    pool = pools.make(size="4G", autocommit=False)
    pool.create("a", "1G")
    volume = pool.volume("a")
    if parent:
        volume.write(BLOCK, pattern(BLOCK))
        pool.snapshot("a", "s")
    for leaf in range(4):
        volume.write(leaf * LEAF, pattern(BLOCK, leaf))
        volume.read(leaf * LEAF, BLOCK)  # the effective leaf is there, too
    pool.journal.bytes_since_checkpoint = 1 << 40
    batch = pool.begin()
    batch.sync()
    pool.finish(batch)
    assert batch._capture is not None
    own, before = volume.layer.own, dict(volume.layer.own)
    expected = list(batch._capture.payloads())
    assert all(held is before[leaf] for leaf, held in (volume.layer.captured or {}).items())
    volume.write(BLOCK, pattern(BLOCK, 9))
    changed = own[0]
    assert changed is not before[0]
    volume.write(2 * BLOCK, pattern(BLOCK, 9))
    assert own[0] is changed, "one copy is enough"
    volume.trim(LEAF, BLOCK)
    volume.trim(2 * LEAF, LEAF)
    volume.write(4 * LEAF, pattern(BLOCK, 4))  # a leaf that the checkpoint does not know
    assert own[3] is before[3], "nobody changed it"
    assert list(batch._capture.payloads()) == expected
    assert check(pool) == []
    batch.write_checkpoint()
    pool.checkpoint_ended(None)
    volume.write(3 * LEAF + BLOCK, pattern(BLOCK, 9))
    assert own[3] is before[3], "the checkpoint is written: nothing is copied any more"


def test_a_checkpoint_that_failed_holds_no_leaf_any_more(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    with monkeypatch.context() as patch:
        patch.setattr(pool.journal, "write_checkpoint", full)
        pool.journal.bytes_since_checkpoint = 1 << 40
        pool.commit()
    assert pool.failed is None
    own = pool.volume("a").layer.own[0]
    pool.volume("a").write(BLOCK, pattern(BLOCK))
    assert pool.volume("a").layer.own[0] is own


def test_a_checkpoint_gives_way_after_each_frame(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdthin.pool.pool._CHECKPOINT_FRAME", 4 * KiB)
    pool = pools.make(size="1G", autocommit=False)
    pool.create("a", "1G")
    for leaf in range(4):
        pool.volume("a").write(leaf * LEAF, pattern(BLOCK))
    pool.journal.bytes_since_checkpoint = 1 << 40
    batch = pool.begin()
    batch.sync()
    pool.finish(batch)
    turns: list[None] = []
    batch.write_checkpoint(lambda: turns.append(None))
    pool.checkpoint_ended(None)
    assert len(turns) == len(frames(checkpoints(pool.path)[-1])) > 4


def test_a_flipped_byte_in_any_frame_of_a_checkpoint_is_found_there(
    pools: Pools, eager_checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdthin.pool.pool._CHECKPOINT_FRAME", 4 * KiB)
    pool = pools.make(size="1G", autocommit=False)
    pool.create("a", "1G")
    for leaf in range(4):
        pool.volume("a").write(leaf * LEAF, pattern(BLOCK))
    pool.commit()
    path = checkpoints(pools.close(pool))[-1]
    places = frames(path)
    assert len(places) > 4
    for start, end in places:
        for offset in (start, start + 16, start + HEADER.size, (start + end) // 2, end - 1):
            flip(path, offset)
            with pytest.raises(Corrupt) as caught:
                Pool.open(pool.path)
            assert (caught.value.path, caught.value.offset) == (path, start)
            flip(path, offset)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[places[0][0] : places[0][1] - 1])
    with pytest.raises(Corrupt) as caught:
        Pool.open(pool.path)
    assert caught.value.offset == places[-1][1], "cut within a frame"
    path.write_bytes(whole)
    pools.open(pool.path)


def test_a_bad_record_says_what_is_wrong() -> None:
    with pytest.raises(BadRecord, match="not a list of records"):
        decode(b"\x91\x92\x63\x01")


def test_removing_goes_on_when_the_file_system_of_the_metadata_is_full(
    small_disk: Path, pools: Pools, small_segments: int
) -> None:
    """Data lies elsewhere; the journal's disk is full, and its open segment too: the next one was made in advance."""
    pool = pools.make(data=small_disk.parent / "data", path=small_disk / "pool")
    for number in range(20):
        pool.create(f"v{number}", MiB)
    while small_segments - frames(logs(pool.path)[-1])[-1][1] > 300:
        pool.label("v0", {"some": "label"})
    with open(small_disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while file.write(bytes(KiB)):
            pass
    segments = logs(pool.path)
    for number in range(20):
        pool.remove(f"v{number}")
    assert logs(pool.path) != segments
    assert pool.failed is None
    assert pool.list() == []
    (small_disk / "ballast").unlink()


def test_a_full_pool_takes_removals(pools: Pools) -> None:
    pool = pools.make(size=256 * KiB, block_size=16 * KiB)
    fill(pool)
    pool.remove("filler")
    assert pool.allocator.free == 15


assert journal_module.SEGMENT_BYTES == 4 * MiB, "FORMAT.md and these tests speak of 4 MiB"


# -- marks written in part


def _two_segments(directory: Path) -> tuple[Path, int]:
    """A segment that another follows, and where its last mark is."""
    journal = append(directory, b"four")
    journal = Journal(directory)
    journal.load(lambda _: None)
    journal.start_segment()
    journal.append(b"five")
    journal.close()
    first = logs(directory.parent)[0]
    return first, frames(first)[-1][1]


@pytest.mark.parametrize("cut", [1, 7, 16, 27])
@pytest.mark.parametrize("behind", [bytes(HEADER.size), mark(4)])
def test_a_last_mark_torn_by_a_power_cut_is_no_damage(directory: Path, cut: int, behind: bytes) -> None:
    path, offset = _two_segments(directory)
    whole = mark(4, journal_module.LAST_MARK)
    assert path.read_bytes()[offset : offset + HEADER.size] == whole
    for torn in (whole[:cut] + behind[cut:], behind[:cut] + whole[cut:]):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(torn)
        assert load(directory, repair_tail=True)[-2:] == [b"four", b"five"]


def test_what_no_mark_leaves_before_a_later_segment_is_damage(directory: Path) -> None:
    path, offset = _two_segments(directory)
    for at in range(HEADER.size):
        if at in (6, 24, 25, 26, 27):  # the kind and the checksum, in which two marks differ: may be a mix of them
            continue
        flip(path, offset + at)
        with pytest.raises(Corrupt):
            load(directory)
        flip(path, offset + at)


def test_its_size_can_be_asked_for_while_a_checkpoint_removes_files(directory: Path) -> None:
    journal = Journal(directory)
    before = journal.disk_bytes
    enough = threading.Event()

    def come_and_go() -> None:
        while not enough.is_set():
            passing = [directory / f"{number}.new" for number in range(50)]
            for path in passing:
                path.touch()
            for path in passing:
                path.unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(500):
            assert journal.disk_bytes == before
    finally:
        enough.set()
        thread.join()
        journal.close()

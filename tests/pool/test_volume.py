"""Reading, writing, trimming and zeroing one volume; what faults and a full pool leave of it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from nbdthin.errors import Invalid, NoSpace, PoolFailed, ReadOnly
from nbdthin.pool.pool import Pool
from nbdthin.pool.volume import ZERO, Volume
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, LEAF, SUB, Calls, Faults, Pools, Writes, contents, fill, pattern

EDGES = (0, 1, 511, 512, SUB - 1, SUB, SUB + 1, BLOCK - 1, BLOCK, BLOCK + 1)


@pytest.fixture
def volume(pool: Pool) -> Volume:
    """4 MiB, empty."""
    pool.create("v", 4 * MiB)
    return pool.volume("v")


# -- reading and writing


def test_a_new_volume_reads_as_zeroes(volume: Volume) -> None:
    assert volume.read(0, volume.size) == bytes(volume.size)


def test_what_is_written_is_read_at_every_alignment(volume: Volume) -> None:
    oracle = bytearray(volume.size)
    for seed, start in enumerate(EDGES):
        for length in EDGES[1:]:
            data = pattern(length, seed)
            offset = BLOCK * 3 + start
            volume.write(offset, data)
            oracle[offset : offset + length] = data
            assert volume.read(offset - BLOCK, length + 2 * BLOCK) == oracle[offset - BLOCK : offset + length + BLOCK]
    assert volume.read(0, volume.size) == oracle


def test_what_is_written_over_a_snapshot_leaves_it_as_it_was(pool: Pool, volume: Volume) -> None:
    volume.write(0, before := pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    oracle = bytearray(before)
    for seed, start in enumerate(EDGES):
        for length in (1, 513, SUB, SUB + 1):
            volume.write(start, data := pattern(length, seed))
            oracle[start : start + length] = data
            assert volume.read(0, 2 * BLOCK) == oracle
    assert pool.volume("s").read(0, 2 * BLOCK) == before


def test_zeroes_before_data_do_not_swallow_it(volume: Volume) -> None:
    """A run of zeroes whose length happens to be the place of the data behind it, but for one."""
    offset = 20 * BLOCK
    volume.write(offset, data := pattern(BLOCK))
    ((position, _),) = volume.segments(offset, BLOCK)
    assert position + 3 <= offset
    for start in range(offset - position - 3, offset - position + 3):
        assert volume.read(start, offset + BLOCK - start) == bytes(offset - start) + data


def test_neighbouring_blocks_are_one_segment_and_zeroes_another(volume: Volume) -> None:
    volume.write(BLOCK, pattern(2 * BLOCK))
    ((position, _),) = volume.segments(BLOCK, 1)
    assert volume.segments(0, 4 * BLOCK) == [(ZERO, BLOCK), (position, 2 * BLOCK), (ZERO, BLOCK)]
    assert volume.segments(BLOCK + 100, 1000) == [(position + 100, 1000)]
    assert volume.segments(0, 0) == []


def test_the_place_of_a_range_is_known_where_it_is_one(pool: Pool, volume: Volume) -> None:
    volume.write(BLOCK, pattern(2 * SUB))
    ((position, _),) = volume.segments(BLOCK, 1)
    assert volume.locate(BLOCK + 5, SUB) == position + 5
    assert volume.locate(BLOCK + SUB, SUB + 1) < 0, "the second half is not there"
    assert volume.locate(BLOCK - 1, 2) < 0, "two blocks"
    assert volume.locate(0, 512) < 0, "zero"
    assert volume.locate(BLOCK, 0) < 0
    pool.snapshot("v", "s")
    assert volume.locate(BLOCK, 2 * SUB) == position, "the parent's"
    volume.write(BLOCK, pattern(SUB, 2))
    assert volume.locate(BLOCK, 2 * SUB) < 0, "two layers"


def test_bytes_of_earlier_owners_of_a_block_are_never_seen(pools: Pools) -> None:
    """New blocks are not zeroed; what is not valid in them is not read."""
    pool = pools.make(size=256 * KiB, block_size=16 * KiB)
    fill(pool)
    pool.volume("filler").write(0, b"secret" * 40_000)
    pool.data.punches = False
    pool.remove("filler")
    pool.create("v", 240 * KiB)
    for block in range(15):
        pool.volume("v").write(block * 16 * KiB + 5000, b"x")
    assert pool.volume("v").read(0, 240 * KiB).count(b"secret") == 0
    assert len(pool.volume("v").read(0, 240 * KiB).replace(b"\0", b"")) == 15


def test_an_overwrite_in_place_changes_no_metadata(pool: Pool, volume: Volume) -> None:
    volume.write(0, pattern(BLOCK))
    pool.commit()
    before = pool.info().sequence, pool.allocator.used
    volume.write(100, pattern(10_000, 2))
    pool.commit()
    assert (pool.info().sequence, pool.allocator.used) == before


def test_a_short_write_inside_a_block_takes_the_short_way(volume: Volume) -> None:
    assert volume.write_small(0, memoryview(pattern(SUB)))
    assert volume.write_small(5, memoryview(b"in place"))
    assert volume.read(0, SUB) == pattern(SUB)[:5] + b"in place" + pattern(SUB)[13:]
    assert not volume.write_small(SUB, memoryview(b"part of a subblock that is not there"))
    assert not volume.write_small(BLOCK - 1, memoryview(b"over the end of a block"))
    assert not volume.write_small(0, memoryview(b""))


@pytest.mark.parametrize("size", [512, 1536, BLOCK - 512, BLOCK + 512, 3 * BLOCK + 5 * 512])
def test_a_volume_of_any_number_of_sectors_can_be_written_to_its_end(pool: Pool, size: int) -> None:
    pool.create("odd", size)
    odd = pool.volume("odd")
    odd.write(0, data := pattern(size))
    assert odd.read(0, size) == data
    pool.snapshot("odd", "s")
    odd.write(size - 1, b"!")
    odd.write_zeroes(0, size // 2)
    assert odd.read(0, size) == bytes(size // 2) + data[size // 2 : -1] + b"!"
    pool.resize("odd", size + BLOCK)
    assert odd.read(size, BLOCK) == bytes(BLOCK)
    pool.clone("s", "large", size=size + BLOCK)
    assert pool.volume("large").read(0, size + BLOCK) == data + bytes(BLOCK)


@pytest.mark.parametrize("size", [512, SUB - 512, SUB, SUB + 512, BLOCK, BLOCK + 1536])
def test_what_was_cut_off_reads_as_zero_after_growing(pool: Pool, volume: Volume, size: int) -> None:
    volume.write(0, data := pattern(3 * BLOCK))
    pool.snapshot("v", "s")
    for _ in range(2):
        pool.resize("v", size)
        pool.resize("v", 3 * BLOCK)
        assert volume.read(0, 3 * BLOCK) == data[:size].ljust(3 * BLOCK, b"\0")
        volume.write(0, data)
    assert pool.volume("s").read(0, 3 * BLOCK) == data


@pytest.mark.parametrize(
    "work",
    [
        lambda volume: volume.read(volume.size, 1),
        lambda volume: volume.read(volume.size - 1, 2),
        lambda volume: volume.read(-1, 1),
        lambda volume: volume.read(0, -1),
        lambda volume: volume.write(volume.size, b"x"),
        lambda volume: volume.write(volume.size - 1, b"xy"),
        lambda volume: volume.write(-1, b"x"),
        lambda volume: volume.trim(0, volume.size + 1),
        lambda volume: volume.write_zeroes(volume.size, 1),
    ],
)
def test_what_reaches_over_the_end_is_refused_with_the_size(volume: Volume, work: Callable[[Volume], object]) -> None:
    with pytest.raises(Invalid, match=f"'v' has {volume.size} bytes"):
        work(volume)


def test_nothing_of_no_length_is_an_error(volume: Volume) -> None:
    for offset in (0, 5, volume.size):
        assert volume.read(offset, 0) == b""
        volume.write(offset, b"")
        volume.trim(offset, 0)
        volume.write_zeroes(offset, 0)
        volume.write_zeroes(offset, 0, allocate=True)
    assert volume.pool.allocator.used == 0


@pytest.mark.parametrize(
    "work",
    [
        lambda volume: volume.write(0, b"x"),
        lambda volume: volume.trim(0, BLOCK),
        lambda volume: volume.write_zeroes(0, BLOCK),
        lambda volume: volume.write_zeroes(0, BLOCK, allocate=True),
    ],
)
def test_a_snapshot_is_not_written(pool: Pool, volume: Volume, work: Callable[[Volume], None]) -> None:
    volume.write(0, data := pattern(BLOCK))
    pool.snapshot("v", "s")
    with pytest.raises(ReadOnly, match="'s' is a snapshot"):
        work(pool.volume("s"))
    assert pool.volume("s").read(0, BLOCK) == data


# -- trimming and zeroing


def test_a_trim_frees_blocks_and_reads_as_zero(pool: Pool, volume: Volume) -> None:
    volume.write(0, data := pattern(4 * BLOCK))
    volume.trim(BLOCK, 2 * BLOCK)
    assert pool.allocator.used == 2
    assert volume.read(0, 4 * BLOCK) == data[:BLOCK] + bytes(2 * BLOCK) + data[3 * BLOCK :]


def test_a_trim_works_by_the_subblock_and_keeps_parts_of_one(pool: Pool, volume: Volume) -> None:
    volume.write(0, data := pattern(BLOCK))
    volume.trim(100, 3 * SUB)
    assert volume.read(0, BLOCK) == data[:SUB] + bytes(2 * SUB) + data[3 * SUB :]
    assert pool.allocator.used == 1


def test_a_block_goes_when_its_last_subblock_is_trimmed(pool: Pool, volume: Volume) -> None:
    volume.write(0, pattern(2 * SUB))
    volume.trim(0, SUB)
    assert pool.allocator.used == 1
    volume.trim(SUB, SUB)
    assert pool.allocator.used == 0


def test_a_trim_over_a_snapshot_hides_it_and_takes_no_block(pool: Pool, volume: Volume) -> None:
    volume.write(0, data := pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    volume.trim(SUB, BLOCK)
    assert volume.read(0, 2 * BLOCK) == data[:SUB] + bytes(BLOCK) + data[SUB + BLOCK :]
    assert pool.volume("s").read(0, 2 * BLOCK) == data
    assert pool.allocator.used == 2


@pytest.mark.parametrize("offset", [0, SUB, LEAF - BLOCK, LEAF])
@pytest.mark.parametrize("length", [LEAF, 2 * LEAF, 2 * LEAF + SUB])
def test_a_trim_of_whole_leaves_is_a_trim_like_any_other(pool: Pool, offset: int, length: int) -> None:
    pool.create("large", 4 * LEAF)
    large = pool.volume("large")
    places = [0, SUB, BLOCK, LEAF - SUB, LEAF, LEAF + 5 * BLOCK, 2 * LEAF - 3 * SUB, 2 * LEAF, 3 * LEAF - SUB, 3 * LEAF]
    for number, place in enumerate(places):
        large.write(place, pattern(SUB, number))
        if number == 4:
            pool.snapshot("large", "s")
    large.write(LEAF + 5 * BLOCK + SUB, pattern(SUB))
    pool.snapshot("large", "s2")
    large.write(LEAF + 5 * BLOCK, pattern(1, 9))
    before = contents(pool)
    large.trim(offset, length)
    for number, place in enumerate(places):
        gone = offset <= place < offset + length
        assert any(large.read(place, SUB)) != gone, number
    assert {name: contents(pool)[name] for name in ("s", "s2")} == {name: before[name] for name in ("s", "s2")}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_many_blocks_are_trimmed_at_once_as_they_are_one_by_one(pools: Pools, layers: int, seed: int) -> None:
    """Over data, zeroes, provisioned blocks, and blocks of which several layers hold parts."""
    once, singly = pools.make(), pools.make()
    for pool in (once, singly):
        rng = random.Random(layers * 100 + seed)
        pool.create("v", 2 * LEAF)
        for number in range(layers):
            if number:
                pool.snapshot("v", f"s{number}")
            for _ in range(150):
                _change(pool.volume("v"), rng)
    for _ in range(4):
        first, last = sorted(rng.randrange(2 * LEAF // SUB) for _ in range(2))
        start, stop = rng.choice(
            ((first, last + 1), (first // 16 * 16, last | 15), (0, last + 1), (first, 2 * LEAF // SUB))
        )
        once.volume("v").trim(start * SUB, (stop - start) * SUB)
        for place in range(start // 16, -(-stop // 16)):
            low, high = max(start, 16 * place), min(stop, 16 * place + 16)
            singly.volume("v").trim(low * SUB, (high - low) * SUB)
        assert _masks(once.volume("v")) == _masks(singly.volume("v"))
        assert once.allocator.used == singly.allocator.used
        for pool in (once, singly):
            for _ in range(20):
                _change(pool.volume("v"), random.Random(start))
    assert contents(once) == contents(singly)
    assert contents(pools.reopen(once)) == contents(singly)


def _change(volume: Volume, rng: random.Random) -> None:
    place = rng.randrange(volume.size // SUB) * SUB
    length = min(rng.choice((SUB, 3 * SUB, BLOCK)), volume.size - place)
    kind = rng.random()
    if kind < 0.7:
        volume.write(place, pattern(length, rng.randrange(100)))
    elif kind < 0.85:
        volume.trim(place, length)
    else:
        volume.write_zeroes(place, length, allocate=True)


def _masks(volume: Volume) -> dict[int, tuple[bool, int]]:
    """Of each block that has an entry: whether it has a physical block, and its masks."""
    entries = ((block, volume.layer.entry(block)) for block in range(volume.size // BLOCK))
    return {block: (entry >> 32 != 0, entry & 0xFFFFFFFF) for block, entry in entries if entry}


def test_a_trim_of_a_huge_empty_volume_looks_only_where_something_is(pool: Pool) -> None:
    pool.create("huge", 1 << 60)
    pool.volume("huge").write(1 << 59, b"x" * SUB)
    pool.volume("huge").trim(0, 1 << 60)
    assert pool.allocator.used == 0


def test_zeroing_parts_of_subblocks_writes_only_where_there_is_data(
    pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.write(0, data := pattern(SUB))
    writes = Writes(monkeypatch, pool)
    volume.write_zeroes(100, 2 * SUB)
    assert volume.read(0, 3 * SUB) == data[:100] + bytes(3 * SUB - 100)
    assert writes.bytes == SUB - 100
    volume.write_zeroes(10 * BLOCK + 1, 1000)
    assert pool.allocator.used == 1


def test_zeroing_inside_one_subblock_keeps_both_sides(volume: Volume) -> None:
    volume.write(0, data := pattern(SUB))
    volume.write_zeroes(100, 50)
    assert volume.read(0, SUB) == data[:100] + bytes(50) + data[150:]


def test_zeroing_with_allocation_takes_blocks_that_later_writes_need(full: Pool) -> None:
    full.create("v", 64 * KiB)
    full.volume("v").write_zeroes(100, 32 * KiB, allocate=True)
    assert full.allocator.used == 3
    fill(full)
    full.volume("v").write(0, data := pattern(48 * KiB))
    assert full.volume("v").read(0, 64 * KiB) == data + bytes(16 * KiB)
    with pytest.raises(NoSpace):
        full.volume("v").write(48 * KiB, b"x")


def test_zeroing_with_allocation_keeps_the_blocks_that_are_there(pool: Pool, volume: Volume) -> None:
    volume.write(0, pattern(2 * BLOCK))
    volume.write_zeroes(0, 2 * BLOCK, allocate=True)
    assert pool.allocator.used == 2
    assert volume.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
    volume.trim(0, 2 * BLOCK)
    assert pool.allocator.used == 0


# -- refused for want of space: nothing changes


@pytest.mark.parametrize(
    "work",
    [
        lambda volume: volume.write(0, pattern(48 * KiB)),
        lambda volume: volume.write(16 * KiB - 1, b"ab"),
        lambda volume: volume.write_zeroes(0, 48 * KiB, allocate=True),
        lambda volume: volume.write_zeroes(100, 48 * KiB - 200),
    ],
    ids=["three blocks", "two blocks", "three blocks of zeroes", "parts of two"],
)
def test_a_write_that_finds_one_block_too_few_changes_nothing(full: Pool, work: Callable[[Volume], None]) -> None:
    full.create("v", 64 * KiB)
    full.volume("v").write(0, pattern(48 * KiB))
    full.snapshot("v", "s")
    full.create("filler", MiB)
    full.volume("filler").write(0, pattern((full.allocator.free - 1) * 16 * KiB))
    full.commit()
    before = full.list(), contents(full), full.allocator.used, full.allocator.pending
    with pytest.raises(NoSpace, match=r"remove snapshots or volumes, trim"):
        work(full.volume("v"))
    assert (full.list(), contents(full), full.allocator.used, full.allocator.pending) == before
    full.volume("v").write(0, b"the last block is still there")


def test_a_full_pool_takes_overwrites_trims_and_whole_zeroes(full: Pool) -> None:
    fill(full)
    filler = full.volume("filler")
    filler.write(5, b"in place")
    filler.write_zeroes(100, 2000)
    filler.trim(16 * KiB, 16 * KiB)
    full.commit()
    filler.write(16 * KiB, b"x")


# -- faults of the disk


def test_a_write_that_fails_gives_its_blocks_back(pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EIO, errno.ENOSPC):
        works: list[Callable[[], object]] = [
            lambda: volume.write(5, pattern(3 * BLOCK)),
            lambda: None if volume.write_small(0, memoryview(bytes(SUB))) else volume.write(0, bytes(SUB)),
        ]
        for work in works:
            with monkeypatch.context() as patch:
                Faults(patch, pool.data, "pwrite", code)
                with pytest.raises(OSError) as caught:
                    work()
            assert caught.value.errno == code
            assert (pool.allocator.used, pool.allocator.pending, volume.layer.own) == (0, 0, {})
    assert volume.read(0, 4 * BLOCK) == bytes(4 * BLOCK)
    assert pool.failed is None


def test_a_write_whose_second_part_fails_changes_no_mapping(
    pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes to two places, as the volume's blocks are not neighbours there."""
    volume.write(BLOCK, pattern(BLOCK))
    before = pool.allocator.used, volume.read(2 * BLOCK, BLOCK), volume.read(0, BLOCK)
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "write", errno.EIO, after=1)
        with pytest.raises(OSError):
            volume.write(0, pattern(3 * BLOCK, 2))
    assert (pool.allocator.used, volume.read(2 * BLOCK, BLOCK), volume.read(0, BLOCK)) == before


def test_a_write_whose_surroundings_cannot_be_read_changes_nothing(
    pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.write(0, data := pattern(SUB))
    pool.snapshot("v", "s")
    used = pool.allocator.used
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "read_into", errno.EIO)
        with pytest.raises(OSError):
            volume.write(5, b"x")
    assert (volume.read(0, SUB), pool.allocator.used) == (data, used)


def test_a_failed_read_says_so_and_nothing_is_made_up(
    pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.write(0, data := pattern(SUB))
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "read_into", errno.EIO)
        with pytest.raises(OSError):
            volume.read(0, SUB)
        assert volume.read(BLOCK, SUB) == bytes(SUB), "zeroes are not on the disk"
    assert volume.read(0, SUB) == data


def test_a_data_file_that_was_cut_is_an_error_and_not_zeroes(pools: Pools) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    with open(pool.data.path, "r+b") as file:
        size = pool.superblock.size
        file.truncate(BLOCK + 100)
        with pytest.raises(OSError, match="short read"):
            pool.volume("v").read(0, BLOCK)
        file.truncate(size)
    assert pool.volume("v").read(0, BLOCK) == pattern(BLOCK)[:100].ljust(BLOCK, b"\0")


def test_a_shrink_that_cannot_write_its_tail_changes_nothing(
    pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.write(0, pattern(2 * BLOCK))
    before = pool.list(), contents(pool), pool.allocator.used
    with monkeypatch.context() as patch:
        Faults(patch, pool.data, "write", errno.EIO)
        with pytest.raises(OSError):
            pool.resize("v", BLOCK + 512)
    assert (pool.list(), contents(pool), pool.allocator.used) == before


def test_data_is_written_before_the_entry_says_so(pool: Pool, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    calls.watch(pool.data, "pwrite", "write")
    calls.watch(pool, "put", "put")
    volume.write(0, pattern(2 * BLOCK))
    volume.write_small(3 * BLOCK, memoryview(pattern(SUB)))
    assert calls.seen == ["write", "write", "put", "put", "write", "put"]


# -- a volume whose name goes


def test_a_volume_that_was_removed_cannot_be_reached(pools: Pools) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    volume = pool.volume("v")
    volume.write(0, pattern(SUB))
    pool.remove("v")
    works: list[Callable[[], object]] = [
        lambda: volume.write(0, b"x"),
        lambda: volume.read(0, 1),
        lambda: volume.trim(0, BLOCK),
        lambda: volume.write_zeroes(0, BLOCK, allocate=True),
    ]
    for work in works:
        with pytest.raises((Invalid, ReadOnly)):
            work()
    pools.reopen(pool)


def test_a_volume_that_was_renamed_is_the_one_of_the_new_name(pool: Pool, volume: Volume) -> None:
    pool.rename("v", "w")
    assert (pool.volume("w") is volume, volume.name) == (True, "w")
    pool.snapshot("w", "s")
    volume.write(0, b"x" * SUB)
    assert not any(pool.volume("s").read(0, SUB))


def test_an_open_volume_follows_a_rollback_a_resize_and_a_snapshot(pool: Pool, volume: Volume) -> None:
    volume.write(0, b"a" * SUB)
    pool.snapshot("v", "s")
    volume.write(0, b"b" * SUB)
    pool.resize("v", MiB)
    assert volume.size == MiB
    pool.rollback("v", "s")
    assert (volume.size, volume.read(0, SUB)) == (4 * MiB, b"a" * SUB)


def test_writing_is_refused_once_a_sync_has_failed_and_reading_goes_on(pools: Pools) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, b"x" * SUB)
    pool.fail(OSError(errno.EIO, "a fault"))
    works: list[Callable[[], object]] = [
        lambda: pool.volume("v").write(0, b"y"),
        lambda: pool.volume("v").trim(0, BLOCK),
        lambda: pool.volume("v").write_zeroes(0, BLOCK),
        lambda: pool.create("w", MiB),
        lambda: pool.commit(),
    ]
    for work in works:
        with pytest.raises(PoolFailed):
            work()
    assert pool.volume("v").read(0, SUB) == b"x" * SUB

"""Which block is handed out next, and when a freed one comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbdthin.errors import NoSpace
from nbdthin.pool.allocator import FREE, HEADER_BLOCKS, NEVER, PENDING, USED, Allocator
from nbdthin.pool.layers import Words
from nbdthin.pool.volume import ZERO
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, FIXED, Calls, Pools, fill, pattern


def blocks(*numbers: int) -> Words:
    return np.array(numbers, dtype=np.uint64)


def take(space: Allocator, layer: int, count: int) -> list[int]:
    return [space.allocate(layer) for _ in range(count)]


def test_the_header_is_never_handed_out() -> None:
    space = Allocator(16, 4)
    assert sorted(take(space, 1, 15)) == list(range(HEADER_BLOCKS, 16))


def limited(total: int, run_blocks: int) -> Allocator:
    """With limits that nobody reaches: layers take runs."""
    space = Allocator(total, run_blocks)
    space.limits = lambda _: (NEVER, 0)
    return space


def test_a_region_lies_in_the_order_of_the_volume_in_whatever_order_it_is_written() -> None:
    space = Allocator(64, 4)
    first = space.allocate(1, 6)  # third of its region
    other = space.allocate(2, 40)
    assert [space.allocate(1, block, first + block - 6) for block in (4, 7, 5)] == [first - 2, first + 1, first - 1]
    assert space.allocate(2, 41, other + 1) == other + 1
    assert (first - 2) // 4 != other // 4


def test_what_regions_leave_free_is_given_out_when_there_is_nothing_else() -> None:
    space = Allocator(17, 4)
    begun = [space.allocate(1, 4 * number) for number in range(4)]
    rest = [space.allocate(2, 1) for _ in range(12)]
    assert sorted(begun + rest) == list(range(HEADER_BLOCKS, 17))
    with pytest.raises(NoSpace):
        space.allocate(2, 1)


def test_the_whole_map_is_not_searched_for_each_block_where_no_whole_run_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = Allocator(16 * 1000 + 1, 16)
    for number in range(1000):
        space.allocate(1, 16 * number)
    searched = 0

    class Map(bytearray):
        def find(self, *wanted: Any) -> int:
            nonlocal searched
            found = super().find(*wanted)
            searched += (found if found >= 0 else len(self)) - wanted[1]
            return found

    monkeypatch.setattr(space, "_map", Map(space._map))
    for number in range(1000):
        space.allocate(2, 16 * number)
    assert searched < 4 * 16 * 1000, "once for whole runs, once for the blocks themselves"


@pytest.mark.parametrize("near", [-3, 0, 63, 64, 1 << 40])
def test_where_a_block_belongs_may_be_taken_or_outside(near: int) -> None:
    space = Allocator(64, 4)
    taken = {space.allocate(1, 63, 63)}
    for _ in range(62):
        taken.add(space.allocate(1, 5, near))
    assert taken == set(range(HEADER_BLOCKS, 64))


def test_a_layer_gets_neighbouring_blocks() -> None:
    assert take(limited(64, 4), 1, 10) == list(range(1, 11))


def test_layers_in_turn_each_stay_contiguous_for_the_length_of_a_run() -> None:
    space = limited(64, 4)
    pairs = [(space.allocate(1), space.allocate(2)) for _ in range(8)]
    assert [one for one, _ in pairs] == [1, 2, 3, 4, 9, 10, 11, 12]
    assert [two for _, two in pairs] == [5, 6, 7, 8, 13, 14, 15, 16]


def test_a_run_that_is_dropped_is_free_for_others() -> None:
    space = limited(9, 8)
    assert take(space, 1, 1) == [1]
    space.drop_run(1)
    assert sorted(take(space, 2, 7)) == list(range(2, 9))


def test_reserved_runs_are_given_up_before_anyone_is_refused() -> None:
    space = limited(9, 4)
    taken = take(space, 1, 1) + take(space, 2, 7)
    assert sorted(taken) == list(range(1, 9))
    with pytest.raises(NoSpace):
        space.allocate(3)


@pytest.mark.parametrize("freed", [(4, 5, 6, 7), (7, 6, 5, 4), (4, 6, 5, 7), (3, 7, 8, 15), (9,), ()])
def test_blocks_are_freed_in_any_order_and_no_others(freed: tuple[int, ...]) -> None:
    space = Allocator(17, 4)
    take(space, 1, 16)
    space.discard_many(blocks(*freed))
    assert np.flatnonzero(space.states() == PENDING).tolist() == sorted(freed)
    assert (space.used, space.pending) == (16 - len(freed), len(freed))
    space.release(blocks(*freed))
    assert np.flatnonzero(space.states() == FREE).tolist() == sorted(freed)
    assert (space.used, space.pending) == (16 - len(freed), 0)


def test_scattered_free_blocks_are_all_found() -> None:
    space = Allocator(17, 4)
    take(space, 1, 16)
    space.discard_many(blocks(3, 7, 8, 15))
    space.release(blocks(3, 7, 8, 15))
    assert sorted(take(space, 2, 4)) == [3, 7, 8, 15]


def test_a_discarded_block_is_pending_until_it_is_released() -> None:
    space = Allocator(4, 1)
    take(space, 1, 3)
    space.discard(2)
    assert (space.used, space.pending, space.free) == (2, 1, 1)
    with pytest.raises(NoSpace):
        space.allocate(1)
    space.release(blocks(2))
    assert space.allocate(1) == 2
    assert (space.used, space.pending, space.free) == (3, 0, 0)


def test_a_refusal_changes_no_figure() -> None:
    space = Allocator(4, 4)
    take(space, 1, 3)
    before = space.used, space.pending, space.free, space.states().tolist()
    with pytest.raises(NoSpace, match="remove snapshots or volumes, trim"):
        space.allocate(2)
    assert (space.used, space.pending, space.free, space.states().tolist()) == before


def test_states_tell_free_used_and_pending_and_no_runs() -> None:
    space = Allocator(6, 4)
    take(space, 1, 2)
    space.discard(1)
    assert space.states().tolist() == [USED, PENDING, USED, FREE, FREE, FREE]


def test_loading_claims_blocks_and_names_those_that_cannot_be() -> None:
    space = Allocator(16, 4)
    assert not len(space.claim(blocks(3, 5, 9)))
    assert space.used == 3
    assert space.claim(blocks(4, 5)).tolist() == [5], "claimed before"
    assert Allocator(16, 4).claim(blocks(2, 16)).tolist() == [16], "outside"
    assert Allocator(16, 4).claim(blocks(2, 7, 2)).tolist() == [2], "twice at once"
    assert Allocator(16, 4).claim(blocks(0)).tolist() == [0], "the header"


@pytest.mark.parametrize("between", [1, 255, 256, 257, 65535, 65536, 100_000])
def test_a_block_that_comes_twice_at_once_is_found_however_far_apart(between: int) -> None:
    claimed = np.random.default_rng(between).permutation(np.arange(1, 150_000, dtype=np.uint64))
    claimed[20_000 + between] = claimed[20_000]
    assert Allocator(150_000, 4).claim(claimed).tolist() == [claimed[20_000]]


def test_what_was_claimed_is_in_use_and_nothing_else() -> None:
    space = Allocator(200_000, 4)
    claimed = np.random.default_rng(1).permutation(np.arange(1, 200_000, dtype=np.uint64))[:150_000]
    for part in np.split(claimed, 3):
        assert not len(space.claim(part))
    assert space.used == 150_000
    assert np.flatnonzero(space.states() == USED).tolist() == sorted([0, *claimed.tolist()])


# -- the pool's use of it


def test_volumes_written_in_turn_are_each_contiguous_for_a_mebibyte(pools: Pools) -> None:
    pool = pools.make()
    for name in "ab":
        pool.create(name, 4 * MiB)
    for block in range(32):
        for name in "ab":
            pool.volume(name).write(block * BLOCK, pattern(BLOCK))
    for name in "ab":
        found = pool.volume(name).segments(0, 2 * MiB)
        assert [length for _, length in found] == [MiB, MiB]


def test_a_volume_written_alone_is_one_piece(pools: Pools) -> None:
    pool = pools.make()
    pool.create("a", 8 * MiB)
    for block in range(128):
        pool.volume("a").write(block * BLOCK, pattern(4 * KiB))
        pool.volume("a").write(block * BLOCK + 4 * KiB, pattern(60 * KiB))
    ((position, length),) = pool.volume("a").segments(0, 8 * MiB)
    assert length == 8 * MiB
    assert position == BLOCK


def test_a_freed_block_is_not_used_again_before_its_batch_is_durable(pools: Pools) -> None:
    pool = pools.make(size=256 * KiB, block_size=16 * KiB, autocommit=False)
    fill(pool)
    pool.volume("filler").trim(0, 16 * KiB)
    with pytest.raises(NoSpace):
        pool.volume("filler").write(0, b"x" * 512)
    batch = pool.begin()
    with pytest.raises(NoSpace):
        pool.volume("filler").write(0, b"x" * 512)
    batch.sync()
    pool.finish(batch)
    pool.commit()
    pool.volume("filler").write(0, b"x" * 512)


def test_blocks_of_a_removed_volume_come_back_with_the_commit(pools: Pools) -> None:
    pool = pools.make(size=256 * KiB, block_size=16 * KiB, autocommit=False)
    fill(pool)
    pool.remove("filler")
    assert (pool.allocator.used, pool.allocator.pending) == (0, 15)
    pool.commit()
    assert (pool.allocator.used, pool.allocator.pending) == (0, 0)


def test_a_freed_block_is_not_used_again_while_a_read_that_began_before_goes_on(pools: Pools) -> None:
    pool = pools.make(size=256 * KiB, block_size=16 * KiB, autocommit=False)
    fill(pool)
    pool.volume("filler").write(0, secret := pattern(16 * KiB))
    pool.commit()
    segments = pool.volume("filler").segments(0, 16 * KiB)
    epoch = pool.enter()
    pool.volume("filler").trim(0, 16 * KiB)
    pool.commit()
    assert pool.allocator.pending == 1
    with pytest.raises(NoSpace):
        pool.volume("filler").write(0, b"x" * 512)
    result = bytearray(16 * KiB)
    pool.volume("filler").read_segments(segments, memoryview(result))
    assert result == secret
    pool.leave(epoch)
    pool.commit()
    assert pool.allocator.pending == 0
    pool.volume("filler").write(0, b"x" * 512)


def test_a_read_that_began_after_a_commit_holds_nothing_back(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(2 * BLOCK))
    pool.commit()
    early = pool.enter()
    pool.volume("a").trim(0, BLOCK)
    pool.commit()
    late = pool.enter()
    pool.volume("a").trim(BLOCK, BLOCK)
    pool.leave(early)
    pool.commit()
    assert pool.allocator.pending == 1, "what was freed while the late one reads"
    pool.leave(late)
    pool.commit()
    assert pool.allocator.pending == 0


def test_reads_that_overlap_hold_back_until_the_last_has_ended(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    pool.commit()
    first, second = pool.enter(), pool.enter()
    pool.volume("a").trim(0, BLOCK)
    pool.commit()
    pool.leave(first)
    assert not pool.can_reclaim
    pool.leave(second)
    assert pool.can_reclaim
    pool.commit()
    assert not pool.can_reclaim


def test_freed_blocks_are_punched_before_they_are_handed_out(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(3 * BLOCK))
    pool.commit()
    calls = Calls(monkeypatch)
    calls.watch(pool.data, "punch", "punch")
    calls.watch(pool.allocator, "release", "release")
    pool.volume("a").trim(0, 3 * BLOCK)
    pool.commit()
    assert calls.seen == ["punch", "release"], "neighbours are one hole"


def test_discarded_space_stays_with_the_pool_where_that_is_wanted(pools: Pools) -> None:
    pool = pools.make(policy=replace(FIXED, punch=False))
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(8 * BLOCK))
    taken = pool.data.allocated
    pool.volume("a").trim(0, 8 * BLOCK)
    pool.commit()
    assert (pool.data.allocated, pool.allocator.used, pool.allocator.pending) == (taken, 0, 0)
    path = pools.close(pool)
    pool = pools.open(path, policy=replace(FIXED, punch=False))
    assert pool.volume("a").read(0, 8 * BLOCK) == bytes(8 * BLOCK)
    pool.volume("a").write(0, pattern(8 * BLOCK, 2))
    assert pool.data.allocated == taken


def test_discarded_space_goes_back_to_the_file_system(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("a", 8 * MiB)
    pool.volume("a").write(0, pattern(8 * MiB))
    pool.commit()
    full = pool.data.path.stat().st_blocks * 512
    assert full >= 8 * MiB
    pool.volume("a").trim(0, 8 * MiB)
    pool.commit()
    assert pool.data.path.stat().st_blocks * 512 <= full - 8 * MiB
    assert pool.volume("a").segments(0, 8 * MiB) == [(ZERO, 8 * MiB)]

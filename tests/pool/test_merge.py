"""Merging layers that lost their name: nothing changes to the eye, at any step, and blocks come free."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest

from nbdthin.pool import merge
from nbdthin.pool.check import check
from nbdthin.pool.pool import Pool
from nbdthin.units import MiB

from .conftest import BLOCK, LEAF, SUB, Faults, Pools, Writes, contents, over_leaves, pattern, used


def unname(pool: Pool, name: str) -> int:
    """Take a name and commit; the number of its layer."""
    number = pool.volume(name).layer.number
    pool.remove(name)
    pool.commit()
    return number


def step_of(pool: Pool, number: int, leaves: int = merge.LEAVES) -> merge.Step:
    return next(iter(merge.steps(pool, pool.state.layers[number], leaves)))


@pytest.fixture
def layered(quiet: Pool) -> Pool:
    """Volume v over snapshot s, which has block 0 whole."""
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(BLOCK))
    quiet.snapshot("v", "s")
    return quiet


def test_a_block_that_the_child_lacks_moves_without_io(layered: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    number = unname(layered, "s")
    places = layered.volume("v").segments(0, BLOCK)
    writes = Writes(monkeypatch, layered)
    layered.merge_all()
    assert (writes.calls, layered.volume("v").segments(0, BLOCK)) == (0, places)
    assert number not in layered.state.layers


def test_a_block_that_the_child_covers_comes_free(layered: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    layered.volume("v").write(0, data := pattern(BLOCK, 2))
    unname(layered, "s")
    writes = Writes(monkeypatch, layered)
    layered.merge_all()
    assert (writes.calls, layered.allocator.used) == (0, 1)
    assert layered.volume("v").read(0, BLOCK) == data


def test_a_block_that_the_child_has_zeroed_comes_free(layered: Pool) -> None:
    layered.volume("v").trim(0, BLOCK)
    unname(layered, "s")
    layered.merge_all()
    assert (layered.allocator.used, layered.volume("v").read(0, BLOCK)) == (0, bytes(BLOCK))


@pytest.mark.parametrize(("own", "copied"), [(1, 15), (8, 8), (15, 1)])
def test_of_a_shared_block_the_missing_part_is_copied(
    layered: Pool, monkeypatch: pytest.MonkeyPatch, own: int, copied: int
) -> None:
    """Into the child's block, as the parent's holds valid bytes where the child's would go."""
    layered.volume("v").write(0, pattern(own * SUB, 2))
    before = layered.volume("v").read(0, BLOCK)
    unname(layered, "s")
    writes = Writes(monkeypatch, layered)
    layered.merge_all()
    assert (writes.bytes, layered.allocator.used) == (copied * SUB, 1)
    assert layered.volume("v").read(0, BLOCK) == before


@pytest.mark.parametrize(("below", "above", "copied"), [(2, 9, 2), (9, 2, 2), (4, 4, 4)])
def test_the_smaller_part_is_copied_where_both_blocks_have_room(
    quiet: Pool, monkeypatch: pytest.MonkeyPatch, below: int, above: int, copied: int
) -> None:
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(below * SUB))
    quiet.snapshot("v", "s")
    quiet.volume("v").write(below * SUB, pattern(above * SUB, 2))
    before = quiet.volume("v").read(0, BLOCK)
    unname(quiet, "s")
    writes = Writes(monkeypatch, quiet)
    quiet.merge_all()
    assert (writes.bytes, quiet.allocator.used) == (copied * SUB, 1)
    assert quiet.volume("v").read(0, BLOCK) == before


def test_a_crash_between_copying_and_the_commit_changes_nothing(pools: Pools) -> None:
    for below, above in ((16, 3), (3, 9), (9, 3)):
        pool = pools.make(autocommit=False)
        pool.create("v", MiB)
        pool.volume("v").write(0, pattern(below * SUB))
        pool.snapshot("v", "s")
        pool.volume("v").write(min(below, 12) * SUB, pattern(above * SUB, 2))
        number = unname(pool, "s")
        before = contents(pool), pool.allocator.used
        step = step_of(pool, number)
        step.copy()
        pool = pools.open(pools.crash(pool))
        assert (contents(pool), pool.allocator.used) == before
        step = step_of(pool, number)
        step.copy()
        step.finish()
        pool = pools.open(pools.crash(pool))
        assert (contents(pool), pool.allocator.used) == before
        pool.merge_all()
        assert (contents(pool), pool.allocator.used) == (before[0], 1)


def test_writes_beside_the_blocks_of_a_step_are_kept(layered: Pool) -> None:
    volume = layered.volume("v")
    layered.volume("v").write(0, pattern(SUB, 2))
    number = unname(layered, "s")
    step = step_of(layered, number)
    assert step.blocks == [0]
    step.copy()
    volume.write(BLOCK, pattern(BLOCK, 3))
    assert step.finish()
    assert volume.read(0, 2 * BLOCK) == pattern(SUB, 2) + pattern(BLOCK)[SUB:] + pattern(BLOCK, 3)


def test_a_block_written_meanwhile_is_left_to_another_step(quiet: Pool) -> None:
    quiet.create("v", MiB)
    volume = quiet.volume("v")
    volume.write(0, pattern(3 * BLOCK))
    quiet.snapshot("v", "s")
    volume.write(0, pattern(SUB, 2))
    number = unname(quiet, "s")
    step = step_of(quiet, number)
    assert step.blocks == [0]
    step.copy()
    volume.write(BLOCK + SUB, pattern(SUB, 3))
    volume.trim(2 * BLOCK, SUB)
    before = contents(quiet)
    assert not step.finish()
    assert contents(quiet) == before
    quiet.commit()
    assert check(quiet) == []
    step = step_of(quiet, number)
    assert step.blocks == [1]
    quiet.merge_all()
    assert (contents(quiet), quiet.allocator.used) == (before, 3)


def test_a_step_takes_several_leaves_but_only_so_many_copies(quiet: Pool) -> None:
    """What is copied holds up the event loop; what only moves hardly does."""
    leaves = 3 * merge.LEAVES
    quiet.create("v", leaves * LEAF)
    for leaf in range(leaves):
        quiet.volume("v").write(leaf * LEAF, pattern(merge.COPIES // 2 * BLOCK, leaf))
    quiet.snapshot("v", "s")
    for leaf in range(merge.LEAVES):  # of these the blocks are joined, those of all others only move
        for block in range(merge.COPIES // 2):
            quiet.volume("v").write(leaf * LEAF + block * BLOCK, pattern(SUB, block))
    number = unname(quiet, "s")
    before = contents(quiet)
    taken = []
    for step in merge.steps(quiet, quiet.state.layers[number]):
        taken.append((len(step.leaves), len(step.blocks)))
        step.copy()
        assert step.finish()
        assert contents(quiet) == before
    assert taken == [(2, merge.COPIES)] * (merge.LEAVES // 2) + [(merge.LEAVES, 0)] * 2


def test_a_merge_can_stop_after_any_leaf_and_go_on_later(pools: Pools) -> None:
    pool = over_leaves(pools.make(autocommit=False), 4, "s")
    for leaf in range(4):
        pool.volume("v").write(leaf * LEAF + BLOCK - SUB, pattern(SUB, leaf))
    number = unname(pool, "s")
    before = contents(pool)
    for _ in range(4):
        step = step_of(pool, number, leaves=1)
        step.copy()
        step.finish()
        assert contents(pool) == before
        pool = pools.reopen(pool, autocommit=False)
        assert contents(pool) == before
    assert next(iter(merge.steps(pool, pool.state.layers[number])), None) is None
    assert number not in pool.state.layers
    assert contents(pool) == before


def test_what_stands_on_an_empty_layer_follows_it_when_it_takes_over_blocks(pools: Pools) -> None:
    pool = over_leaves(pools.make(autocommit=False), 2, "s0")
    for leaf in range(2):
        pool.volume("v").write(leaf * LEAF, pattern(BLOCK, 2 + leaf))
    for name in ("s1", "s2", "s3"):
        pool.snapshot("v", name)
    pool.clone("s3", "clone")
    number = unname(pool, "s1")
    before = contents(pool)  # reads all: s2, s3, v and clone own nothing, and have the caches of what was s1
    layer = pool.state.layers[number]
    assert pool.volume("clone").layer.effective_leaves is layer.effective_leaves
    step = step_of(pool, number, leaves=1)
    step.copy()
    step.finish()
    assert contents(pool) == before
    assert layer.effective(0) is pool.volume("s0").layer.effective(0)
    assert check(pool) == []
    pool.merge_all()
    assert contents(pool) == before


def test_what_stands_above_looks_at_blocks_anew_only_where_some_were_copied(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", 2 * LEAF)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.volume("v").write(LEAF, pattern(BLOCK))
    pool.snapshot("v", "s")
    pool.volume("v").write(BLOCK, pattern(BLOCK, 2))  # beside what moves
    pool.volume("v").write(LEAF, pattern(SUB, 2))  # over it: what is left below has to be copied
    pool.snapshot("v", "image")
    pool.clone("image", "clone")
    pool.volume("clone").write(2 * BLOCK, pattern(BLOCK, 3))
    number = unname(pool, "s")
    before = contents(pool)
    clone = pool.volume("clone").layer
    moved, joined = clone.effective(0), clone.effective(1)
    pool.merge_all()
    assert number not in pool.state.layers
    assert clone.effective(0) is moved and clone.effective(1) is not joined
    assert contents(pool) == before


def test_a_chain_of_layers_without_names_becomes_one(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", 8 * MiB)
    rng = random.Random(1)
    for number in range(20):
        for _ in range(3):
            pool.volume("v").write(rng.randrange(8 * MiB - 3 * BLOCK), pattern(rng.randrange(1, 3 * BLOCK), number))
        pool.volume("v").trim(rng.randrange(4 * MiB), rng.randrange(MiB))
        pool.snapshot("v", f"s{number}")
    pool.commit()
    before = contents(pool)["v"]
    order = list(range(20))
    rng.shuffle(order)
    for number in order:
        pool.remove(f"s{number}")
        pool.commit()
        pool.merge_all()
        assert contents(pool)["v"] == before
    assert len(pool.state.layers) == 1
    assert pool.show("v").exclusive == pool.info().data_used


def test_what_is_merged_below_a_snapshot_shows_in_all_above_it(quiet: Pool) -> None:
    """Whose caches point to where the bytes were."""
    quiet.create("v", MiB)
    volume = quiet.volume("v")
    volume.write(0, pattern(2 * BLOCK))
    quiet.snapshot("v", "s1")
    volume.write(SUB, pattern(SUB, 2))
    quiet.snapshot("v", "s2")
    quiet.clone("s2", "c")
    quiet.volume("c").write(3 * SUB, pattern(SUB, 3))
    volume.write(5 * SUB, pattern(SUB, 4))
    before = contents(quiet)
    del before["s1"]
    unname(quiet, "s1")
    quiet.merge_all()
    assert contents(quiet) == before


def test_a_layer_with_several_children_stays_and_gives_up_what_none_shows(quiet: Pool) -> None:
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(4 * BLOCK))
    quiet.snapshot("v", "s")
    quiet.clone("s", "c")
    quiet.volume("v").write(0, pattern(2 * BLOCK, 2))
    quiet.volume("c").trim(BLOCK, 2 * BLOCK)
    before = contents(quiet)
    del before["s"]
    number = unname(quiet, "s")
    quiet.merge_all()
    assert quiet.state.layers[number].blocks == 3
    assert contents(quiet) == before


def test_a_layer_is_not_merged_before_the_removal_of_its_name_is_durable(pools: Pools) -> None:
    """A crash would bring it back, with what the head had meanwhile written into its blocks."""
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, data := pattern(BLOCK))
    pool.snapshot("v", "s")
    pool.commit()
    number = pool.volume("s").layer.number
    pool.remove("s")
    for step in merge.steps(pool, pool.state.layers[number]):
        step.copy()
        step.finish()
    pool.volume("v").write(0, pattern(BLOCK, 2))
    pool = pools.open(pools.crash(pool))
    assert pool.volume("s").read(0, BLOCK) == data


def test_nor_while_the_batch_that_removes_it_is_being_made_durable(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, data := pattern(BLOCK))
    pool.snapshot("v", "s")
    pool.commit()
    pool.remove("s")
    pool.begin()
    assert pool.next_unnamed() is None
    pool = pools.open(pools.crash(pool))
    assert pool.volume("s").read(0, BLOCK) == data


def test_a_step_whose_copy_fails_is_given_up_and_tried_again(layered: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    layered.volume("v").write(0, pattern(SUB, 2))
    before = contents(layered)["v"]
    unname(layered, "s")
    for method in ("read_into", "write"):
        with monkeypatch.context() as patch:
            Faults(patch, layered.data, method, errno.EIO)
            with pytest.raises(OSError):
                layered.merge_all()
        assert contents(layered)["v"] == before
        assert check(layered) == []
    layered.merge_all()
    assert (contents(layered)["v"], layered.allocator.used) == (before, 1)


def test_a_full_pool_can_be_merged(full: Pool) -> None:
    full.create("v", 15 * 16 * 1024)
    full.volume("v").write(0, pattern(7 * 16 * 1024))
    full.snapshot("v", "s")
    for block in range(7):
        full.volume("v").write(block * 16 * 1024, pattern(1024, block))
    full.volume("v").write(14 * 16 * 1024, pattern(1024))
    full.commit()
    assert full.allocator.free == 0
    before = contents(full)["v"]
    unname(full, "s")
    full.merge_all()
    assert (contents(full)["v"], full.allocator.free) == (before, 7)


def test_the_child_may_go_while_its_parent_is_being_merged(layered: Pool) -> None:
    number = unname(layered, "s")
    steps = merge.steps(layered, layered.state.layers[number])
    step = next(steps)
    step.copy()
    layered.remove("v")
    assert next(steps, None) is None
    layered.commit()
    assert (layered.state.layers, layered.allocator.used) == ({}, 0)


def test_a_volume_that_stands_on_nothing_any_more_reads_what_it_writes_next(pools: Pools) -> None:
    """Its own leaves become its effective ones, also where it had composed one before."""
    pool = pools.make()
    pool.create("a", 3 * LEAF)
    volume = pool.volume("a")
    volume.write(0, pattern(BLOCK))
    pool.snapshot("a", "s")
    volume.write(LEAF, pattern(BLOCK, 2))
    assert volume.read(LEAF, BLOCK) == pattern(BLOCK, 2)
    pool.remove("s")
    assert volume.layer.parent is None
    volume.write(LEAF + BLOCK, pattern(BLOCK, 3))
    assert volume.read(LEAF, 2 * BLOCK) == pattern(BLOCK, 2) + pattern(BLOCK, 3)


def test_pruning_keeps_a_block_of_which_one_child_shows_one_subblock(pools: Pools) -> None:
    pool = pools.make()
    pool.create("a", MiB)
    volume = pool.volume("a")
    volume.write(0, pattern(2 * BLOCK))
    pool.snapshot("a", "s")
    pool.clone("s", "b")
    other = pool.volume("b")
    volume.write(0, pattern(2 * BLOCK, 2))
    other.write(0, pattern(2 * BLOCK - SUB, 3))
    used = pool.allocator.used
    pool.remove("s")
    assert pool.allocator.used == used - 1
    assert volume.read(0, 2 * BLOCK) == pattern(2 * BLOCK, 2)
    assert other.read(0, 2 * BLOCK) == pattern(2 * BLOCK - SUB, 3) + pattern(2 * BLOCK)[-SUB:]


def joined_one_by_one(upper: int, lower: int) -> tuple[int, int] | None:
    """What stands for both entries of a block and the physical block that comes free, said case by case.

    None: it takes a copy.
    """
    if not lower:
        return upper, 0
    covered = (upper | upper >> 16) & 0xFFFF
    shows = lower & 0xFFFF & ~covered
    zero = (upper >> 16 | lower >> 16 & ~covered) & 0xFFFF
    above, below = upper >> 32, lower >> 32
    if upper & 0xFFFF:
        return None if shows else (above << 32 | zero << 16 | upper & 0xFFFF, below)
    if shows or (below and not above and not covered):
        return below << 32 | zero << 16 | shows, above
    return above << 32 | zero << 16, below


def some_entries(rng: random.Random, first: int) -> list[int]:
    """A leaf of sound entries of all kinds, each with a physical block of its own."""
    found = []
    for index in range(512):
        mask = rng.choice((0, 0xFFFF, rng.getrandbits(16), 1 << rng.randrange(16)))
        data = mask & rng.choice((0, 0xFFFF, rng.getrandbits(16)))
        zero = mask & ~data
        provisioned = rng.random() < 0.3
        found.append((first + index if data or provisioned else 0) << 32 | zero << 16 | data)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_leaf_joined_at_once_is_its_blocks_joined_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    upper, lower = some_entries(rng, 1), some_entries(rng, 1000)
    joined, gone, done = merge.join(np.array(upper, dtype=np.uint64), np.array(lower, dtype=np.uint64))
    for index in range(512):
        expected = joined_one_by_one(upper[index], lower[index])
        assert bool(done[index]) == (expected is not None)
        if expected is not None:
            assert (int(joined[index]), int(gone[index])) == expected
        else:
            assert (int(joined[index]), int(gone[index])) == (upper[index], 0)


def written_over_by_two(pool: Pool, volume: str, snapshot: str, clone: str) -> None:
    """A snapshot of a volume, and a clone of that; both hide what the snapshot has in the first block."""
    pool.volume(volume).write(0, pattern(BLOCK, 1))
    pool.snapshot(volume, snapshot)
    pool.clone(snapshot, clone)
    for name in (volume, clone):
        pool.volume(name).write(0, pattern(BLOCK, 2))


def test_what_a_layer_takes_over_and_all_its_children_hide_is_freed(pool: Pool) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.snapshot("v", "low")
    pool.volume("v").write(BLOCK, pattern(BLOCK))
    pool.snapshot("v", "high")
    pool.clone("high", "c")
    for name in "vc":
        pool.volume(name).write(0, pattern(BLOCK, 2))
    pool.remove("low", "high")
    assert used(pool) == 1 + 2


@pytest.mark.parametrize("order", [("low", "high"), ("high", "low")])
def test_what_a_pruned_layer_hid_stays_hidden(pool: Pool, order: tuple[str, str]) -> None:
    pool.create("v", MiB)
    written_over_by_two(pool, "v", "low", "b")
    written_over_by_two(pool, "v", "high", "c")
    pool.remove(*order)
    assert used(pool) == 3
    pool.volume("c").trim(0, BLOCK)
    assert pool.volume("c").read(0, BLOCK) == bytes(BLOCK)
    pool.remove("v")
    assert pool.volume("c").read(0, BLOCK) == bytes(BLOCK)


def test_a_leaf_of_which_much_must_be_copied_takes_several_steps(quiet: Pool) -> None:
    count = 2 * merge.COPIES + 1
    quiet.create("v", count * BLOCK)
    quiet.volume("v").write(0, pattern(count * BLOCK))
    quiet.snapshot("v", "s")
    for block in range(count):
        quiet.volume("v").write(block * BLOCK, pattern(SUB, 2))
    number = unname(quiet, "s")
    before = contents(quiet)
    copied = []
    for step in merge.steps(quiet, quiet.state.layers[number]):
        copied.append(len(step.blocks))
        step.copy()
        assert step.finish() == (sum(copied) == count)
        assert check(quiet) == []
        assert contents(quiet) == before
    assert copied == [merge.COPIES, merge.COPIES, 1]

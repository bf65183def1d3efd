"""Ranges: BLOCK_STATUS of a volume, and where two snapshots differ."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from nbdthin.pool import extents
from nbdthin.pool.extents import HOLE, STATUS_LEAVES, ZERO
from nbdthin.pool.layers import SUBBLOCKS, Layer, are_mixed, words
from nbdthin.pool.pool import Pool
from nbdthin.pool.rows import Extent
from nbdthin.units import MiB

from .conftest import BLOCK, LEAF, SUB, Pools, pattern

DATA = 0
EMPTY = HOLE | ZERO


@pytest.fixture
def volume(pool: Pool) -> Pool:
    pool.create("v", 4 * MiB)
    return pool


def status(pool: Pool, name: str, context: str, offset: int, length: int, most: int = 1000) -> list[tuple[int, int]]:
    found = extents.status(pool.volume(name).layer, context, offset, length, SUB, most)
    return [(length, flags) for length, flags in found.tolist()]


def allocation(pool: Pool, offset: int, length: int, most: int = 1000, name: str = "v") -> list[tuple[int, int]]:
    return status(pool, name, "base:allocation", offset, length, most)


def depth(pool: Pool, offset: int, length: int, most: int = 1000, name: str = "v") -> list[tuple[int, int]]:
    return status(pool, name, "qemu:allocation-depth", offset, length, most)


def test_an_empty_volume_is_one_hole(volume: Pool) -> None:
    assert allocation(volume, 0, 4 * MiB) == [(4 * MiB, EMPTY)]
    assert depth(volume, 0, 4 * MiB) == [(4 * MiB, 0)]


def test_data_is_told_from_holes_by_the_subblock(volume: Pool) -> None:
    volume.volume("v").write(BLOCK + SUB, pattern(2 * SUB))
    assert allocation(volume, 0, 4 * BLOCK) == [
        (BLOCK, EMPTY),
        (SUB, ZERO),
        (2 * SUB, DATA),
        (13 * SUB, ZERO),
        (2 * BLOCK, EMPTY),
    ]
    assert depth(volume, 0, 4 * BLOCK) == [(BLOCK + SUB, 0), (2 * SUB, 1), (2 * BLOCK + 13 * SUB, 0)]


def test_an_answer_begins_and_ends_where_it_was_asked_to(volume: Pool) -> None:
    volume.volume("v").write(BLOCK, pattern(BLOCK))
    assert allocation(volume, BLOCK - 5, 10) == [(5, EMPTY), (5, DATA)]
    assert allocation(volume, BLOCK + 7, 100) == [(100, DATA)]
    assert allocation(volume, 2 * BLOCK - 1, 2) == [(1, DATA), (1, EMPTY)]
    assert depth(volume, BLOCK - 5, 10) == [(5, 0), (5, 1)]


def test_neighbours_of_one_kind_are_one_extent_over_leaves_and_layers(pool: Pool) -> None:
    pool.create("large", 3 * LEAF)
    pool.volume("large").write(LEAF - BLOCK, pattern(2 * BLOCK))
    pool.snapshot("large", "s")
    pool.volume("large").write(LEAF - 2 * BLOCK, pattern(2 * BLOCK))
    assert status(pool, "large", "base:allocation", 0, 3 * LEAF, 1000) == [
        (LEAF - 2 * BLOCK, EMPTY),
        (3 * BLOCK, DATA),
        (2 * LEAF - BLOCK, EMPTY),
    ]


def test_depth_counts_the_layers_down_to_the_owner(volume: Pool) -> None:
    for number in range(4):
        volume.volume("v").write(number * SUB, pattern((8 - 2 * number) * SUB))
        volume.snapshot("v", f"s{number}")
    down = [(SUB, 5), (SUB, 4), (SUB, 3), (2 * SUB, 2), (SUB, 3), (SUB, 4), (SUB, 5), (8 * SUB, 0)]
    assert depth(volume, 0, BLOCK) == down
    assert depth(volume, 0, BLOCK, name="s3")[0] == (SUB, 4)


def test_a_zero_over_data_is_a_zero_at_its_own_depth(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(4 * SUB))
    volume.snapshot("v", "s")
    volume.volume("v").trim(SUB, SUB)
    assert allocation(volume, 0, 4 * SUB) == [(SUB, DATA), (SUB, EMPTY), (2 * SUB, DATA)]
    assert depth(volume, 0, 4 * SUB) == [(SUB, 2), (SUB, 1), (2 * SUB, 2)]


def test_a_provisioned_zero_is_no_hole(volume: Pool) -> None:
    volume.volume("v").write_zeroes(0, BLOCK, allocate=True)
    assert allocation(volume, 0, 2 * BLOCK) == [(BLOCK, ZERO), (BLOCK, EMPTY)]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6])
def test_no_answer_has_more_extents_than_were_asked_for(pool: Pool, most: int) -> None:
    pool.create("large", 3 * LEAF)
    for block in range(0, 6, 2):
        pool.volume("large").write(block * BLOCK, pattern(BLOCK))
    pool.volume("large").write(LEAF - BLOCK, pattern(BLOCK))
    whole = status(pool, "large", "base:allocation", 0, 3 * LEAF, 1000)
    assert [flags for _, flags in whole] == [DATA, EMPTY] * 4
    assert status(pool, "large", "base:allocation", 0, 3 * LEAF, most) == whole[:most]
    assert status(pool, "large", "base:allocation", LEAF - BLOCK, 2 * LEAF, 1) == [(BLOCK, DATA)]


def test_an_answer_over_many_leaves_may_stop_early_and_is_right_as_far_as_it_goes(pool: Pool) -> None:
    pool.create("large", 2 * STATUS_LEAVES * LEAF)
    with pool.batch():
        pass
    for leaf in range(STATUS_LEAVES + 5):
        pool.volume("large").write(leaf * LEAF, pattern(SUB))
    found = status(pool, "large", "base:allocation", 0, 2 * STATUS_LEAVES * LEAF, 10_000)
    assert sum(length for length, _ in found) == STATUS_LEAVES * LEAF
    assert found[:3] == [(SUB, DATA), (BLOCK - SUB, ZERO), (LEAF - BLOCK, EMPTY)]
    rest = status(pool, "large", "base:allocation", STATUS_LEAVES * LEAF, STATUS_LEAVES * LEAF, 10_000)
    assert sum(length for length, _ in rest) == STATUS_LEAVES * LEAF


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth"])
def test_leaves_of_all_kinds_behind_each_other_are_told_as_one_by_one(pools: Pools, context: str) -> None:
    """Empty ones, whole blocks, parts of blocks, and blocks of which several layers hold parts; and any beginning."""
    leaves = 12
    pool = pools.make()
    pool.create("v", leaves * LEAF)
    rng = random.Random(5)
    for number, sizes in enumerate(((BLOCK,), (SUB, BLOCK), (SUB, 2 * SUB))):
        for leaf in {0, 1, 2, 4, 5, 8, 9, 10} - {number, 2 * number}:
            for _ in range(25):  # close together, so that parts of one block come to be in several layers
                place, length = leaf * LEAF + rng.randrange(30 * 16) * SUB, rng.choice(sizes)
                pool.volume("v").write(place - place % length, pattern(length))
        pool.volume("v").trim(rng.randrange(30 * 16) * SUB, 2 * BLOCK)
        if number < 2:
            pool.snapshot("v", f"s{number}")
    layer = pool.volume("v").layer
    assert max(int(are_mixed(words(layer.effective(leaf))).sum()) for leaf in range(leaves)) >= 16
    expected = [_of(context, layer, number) for number in range(leaves * LEAF // SUB)]
    for start in (0, 5, 16, LEAF // SUB - 1, 3 * LEAF // SUB, 7 * LEAF // SUB + 3):
        runs = [(SUB * len(list(same)), flags) for flags, same in groupby(expected[start:])]
        for most in (1, 2, 3, 7, 50, 10_000):
            found = status(pool, "v", context, start * SUB, leaves * LEAF - start * SUB, most)
            assert found == runs[:most]


def _of(context: str, layer: Layer, number: int) -> int:
    """What is to be said of a subblock, by walking the layers."""
    block, sub = divmod(number, SUBBLOCKS)
    node: Layer | None = layer
    depth = 1
    while node is not None:
        entry = node.entry(block)
        if (entry | entry >> 16) >> sub & 1:
            if context != "base:allocation":
                return depth
            if entry >> sub & 1:
                return DATA
            break
        node = node.parent
        depth += 1
    return 0 if context != "base:allocation" else ZERO if layer.entry(block) >> 32 else EMPTY


def test_an_extent_over_many_leaves_is_whole_however_few_are_asked_for(pools: Pools) -> None:
    pool = pools.make(size=256 * MiB)
    pool.create("v", 8 * LEAF)
    pool.volume("v").write_zeroes(BLOCK, 6 * LEAF, allocate=True)
    whole = [(BLOCK, EMPTY), (6 * LEAF, ZERO), (2 * LEAF - BLOCK, EMPTY)]
    for first in range(3):
        start = sum(length for length, _ in whole[:first])
        assert status(pool, "v", "base:allocation", start, 8 * LEAF - start, 1) == whole[first : first + 1]


def test_an_odd_end_of_a_volume_is_where_its_last_extent_ends(pool: Pool) -> None:
    pool.create("odd", BLOCK + 512)
    pool.volume("odd").write(BLOCK, pattern(512))
    assert status(pool, "odd", "base:allocation", 0, BLOCK + 512, 10) == [(BLOCK, EMPTY), (512, DATA)]


def test_the_sum_of_answers_of_any_size_is_the_whole(volume: Pool) -> None:
    volume.volume("v").write(SUB, pattern(3 * SUB))
    volume.snapshot("v", "s")
    volume.volume("v").write(2 * BLOCK, pattern(BLOCK))
    volume.volume("v").trim(2 * SUB, SUB)
    for kind in (allocation, depth):
        whole = kind(volume, 0, 4 * BLOCK)
        for part in (512, 1000, SUB, BLOCK):
            bits = [flags for length, flags in whole for _ in range(length // 8)]
            again: list[int] = []
            for offset in range(0, 4 * BLOCK, part - part % 8):
                length = min(part - part % 8, 4 * BLOCK - offset)
                again += [flags for length, flags in kind(volume, offset, length) for _ in range(length // 8)]
            assert again == bits


# -- diff


def test_a_snapshot_does_not_differ_from_itself(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(BLOCK))
    volume.snapshot("v", "s")
    assert volume.diff("s", "s") == []


def test_a_diff_holds_what_was_written_between_and_says_data_or_zero(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(4 * BLOCK))
    volume.snapshot("v", "one")
    volume.volume("v").write(SUB, pattern(SUB, 2))
    volume.volume("v").trim(2 * BLOCK, SUB)
    volume.snapshot("v", "between")
    volume.volume("v").write(2 * BLOCK + SUB, pattern(10, 3))
    volume.snapshot("v", "two")
    expected = [Extent(SUB, SUB, True), Extent(2 * BLOCK, SUB, False), Extent(2 * BLOCK + SUB, SUB, True)]
    assert volume.diff("one", "two") == expected
    volume.remove("between")
    assert volume.diff("one", "two") == expected


def test_a_diff_backwards_has_the_same_places(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(BLOCK))
    volume.snapshot("v", "one")
    volume.volume("v").trim(0, SUB)
    volume.volume("v").write(BLOCK, pattern(SUB))
    volume.snapshot("v", "two")
    assert volume.diff("one", "two") == [Extent(0, SUB, False), Extent(BLOCK, SUB, True)]
    assert volume.diff("two", "one") == [Extent(0, SUB, True), Extent(BLOCK, SUB, False)]


def test_snapshots_of_two_clones_differ_by_what_was_written_to_either(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(8 * BLOCK))
    volume.snapshot("v", "image")
    for number, name in enumerate("ab"):
        volume.clone("image", name)
        volume.volume(name).write(number * BLOCK, pattern(SUB, number))
        volume.snapshot(name, f"{name}@1")
    assert volume.diff("a@1", "b@1") == [Extent(0, SUB, True), Extent(BLOCK, SUB, True)]


def test_snapshots_without_a_common_ancestor_differ_where_either_holds_something(volume: Pool) -> None:
    volume.create("w", 4 * MiB)
    volume.volume("v").write(0, pattern(SUB))
    volume.volume("w").write(BLOCK, pattern(SUB))
    volume.snapshot("v", "v@1")
    volume.snapshot("w", "w@1")
    assert volume.diff("v@1", "w@1") == [Extent(0, SUB, False), Extent(BLOCK, SUB, True)]


def test_between_two_ends_all_differs(volume: Pool) -> None:
    volume.volume("v").write(0, pattern(BLOCK))
    volume.snapshot("v", "small")
    volume.resize("v", 8 * MiB + 512)
    volume.volume("v").write(6 * MiB, pattern(SUB))
    volume.snapshot("v", "large")
    assert volume.diff("small", "large") == [
        Extent(4 * MiB, 2 * MiB, False),
        Extent(6 * MiB, SUB, True),
        Extent(6 * MiB + SUB, 2 * MiB + 512 - SUB, False),
    ]
    assert volume.diff("large", "small") == [Extent(4 * MiB, 4 * MiB + 512, False)]


def test_an_end_within_a_subblock_is_exact(pool: Pool) -> None:
    pool.create("v", 1536)
    pool.volume("v").write(0, pattern(1536))
    pool.snapshot("v", "small")
    pool.resize("v", SUB)
    pool.snapshot("v", "large")
    assert pool.diff("small", "large") == [Extent(1536, SUB - 1536, False)]


def test_a_diff_costs_what_changed_and_not_the_size(pool: Pool) -> None:
    pool.create("huge", 1 << 60)
    pool.snapshot("huge", "one")
    pool.volume("huge").write((1 << 60) - SUB, pattern(SUB))
    pool.snapshot("huge", "two")
    assert pool.diff("one", "two") == [Extent((1 << 60) - SUB, SUB, True)]

"""Entries, leaves and what they amount to together: against the definition, one subblock at a time."""

from __future__ import annotations

import random
import struct
from array import array
from collections import Counter

import pytest

from nbdthin.pool import records
from nbdthin.pool.check import check
from nbdthin.pool.layers import (
    FULL,
    LEAF_SHIFT,
    MIXED,
    SUBBLOCKS,
    ZERO_LEAF,
    Layer,
    State,
    compose,
    compose_leaves,
    covers_all,
    is_mixed,
)
from nbdthin.pool.records import LEAF_BLOCKS, BadRecord, Entries, Leaf, Name, Record, Unname, u64
from nbdthin.units import KiB

from .conftest import BLOCK, LEAF, SUB, Pools, pattern, walk


def entry(physical: int, zero: int, data: int) -> int:
    return physical << 32 | zero << 16 | data


def test_an_entry_is_block_zero_mask_and_data_mask(pools: Pools) -> None:
    """As FORMAT.md has it, taken apart by hand."""
    pool = pools.make()
    pool.create("a", 2 * BLOCK)
    pool.volume("a").write(BLOCK, pattern(BLOCK))
    pool.snapshot("a", "s")
    pool.volume("a").write(BLOCK + 2 * SUB, pattern(SUB))
    pool.volume("a").trim(BLOCK + 5 * SUB, 2 * SUB)
    packed = struct.pack("<Q", pool.volume("a").layer.entry(1))
    data, zero, physical = struct.unpack("<HHI", packed)
    assert (data, zero) == (1 << 2, 1 << 5 | 1 << 6)
    position, _ = pool.volume("a").segments(BLOCK + 2 * SUB, SUB)[0]
    assert position == physical * BLOCK + 2 * SUB


def meaning(value: int) -> list[int | None]:
    """Of each subblock: its physical block, 0 for zero, None for the parent's."""
    return [value >> 32 if value >> sub & 1 else 0 if value >> (16 + sub) & 1 else None for sub in range(SUBBLOCKS)]


def some_entry(rng: random.Random, first: int = 1) -> int:
    """Any sound entry; its block is one of the eight from `first` on, as no two layers own the same."""
    data = rng.choice([0, 0, FULL, 1, rng.getrandbits(16)])
    zero = rng.choice([0, 0, FULL, 1, rng.getrandbits(16)]) & ~data
    return entry(rng.randrange(first, first + 8) if data else rng.choice([0, first]), zero, data)


def test_composing_two_entries_is_what_the_masks_say_of_each_subblock() -> None:
    rng = random.Random(1)
    for _ in range(5000):
        own, below = some_entry(rng), some_entry(rng, 9)
        upper, lower = meaning(own), [physical or 0 for physical in meaning(below)]
        expected = [below if above is None else above for above, below in zip(upper, lower, strict=True)]
        composed = compose(own, below)
        if is_mixed(composed):
            (one, ones), (_, others) = Counter(filter(None, expected)).most_common()  # "mixed" where two are needed
            assert composed >> 32 == one or ones == others
            assert all(expected[sub] == composed >> 32 for sub in range(SUBBLOCKS) if composed >> sub & 1)
            assert (composed & FULL).bit_count() == ones
        else:
            assert [physical or 0 for physical in meaning(composed)] == expected


def mixed_entry(physical: int, data: int) -> int:
    """An effective entry of a block of which `data` is in a physical one, and the rest elsewhere."""
    return entry(physical, data, data)


@pytest.mark.parametrize("below", [MIXED, mixed_entry(9, 0b110)])
def test_composing_over_a_mixed_entry_is_mixed_unless_nothing_of_it_shows(below: int) -> None:
    assert is_mixed(below)
    assert compose(entry(3, 0, FULL), below) == entry(3, 0, FULL)
    assert compose(entry(3, 0xFF00, 0x00FF), below) == entry(3, 0xFF00, 0x00FF)
    assert compose(entry(0, FULL, 0), below) == entry(0, FULL, 0)
    assert compose(entry(3, 0, FULL ^ 1), below) == mixed_entry(3, FULL ^ 1)
    assert compose(0, below) == below


def test_a_mixed_entry_has_the_block_that_most_of_what_shows_is_in() -> None:
    below = compose(entry(3, 0, 1), entry(9, 0, FULL))
    assert below == mixed_entry(9, FULL ^ 1)
    assert compose(entry(4, 0, 0xFFF0), below) == mixed_entry(4, 0xFFF0)
    assert compose(entry(4, 0, 0b100), below) == mixed_entry(9, FULL ^ 0b101)
    assert compose(entry(0, FULL ^ 1, 0), below) == MIXED, "what it knows does not show"
    assert compose(entry(0, 1, 0), below) == entry(9, 0, FULL ^ 1), "what it does not know does not show"


def test_composing_leaves_is_composing_their_entries() -> None:
    rng = random.Random(2)
    own = array("Q", [some_entry(rng) for _ in range(LEAF_BLOCKS)])
    mixed = [MIXED, *(mixed_entry(9, 1 << sub | 1) for sub in range(SUBBLOCKS))]
    below = array("Q", [rng.choice([rng.choice(mixed), some_entry(rng, 9)]) for _ in range(LEAF_BLOCKS)])
    assert list(compose_leaves(own, below)) == [compose(*pair) for pair in zip(own, below, strict=True)]


def test_a_leaf_covers_all_when_no_subblock_is_inherited() -> None:
    leaf = array("Q", [entry(1, 0xFF00, 0x00FF)] * LEAF_BLOCKS)
    assert covers_all(leaf)
    leaf[17] ^= 1
    assert not covers_all(leaf)


# -- chains


class Chain:
    """Layers one on top of the other, without a pool."""

    def __init__(self, depth: int) -> None:
        self.layers: list[Layer] = []
        for number in range(1, depth + 1):
            parent = self.layers[-1] if self.layers else None
            layer = Layer(number, parent)
            if parent is not None:
                parent.children[number] = layer
            self.layers.append(layer)

    @property
    def head(self) -> Layer:
        self.layers[-1].head = True
        return self.layers[-1]


def test_an_effective_entry_says_of_each_subblock_what_walking_says() -> None:
    rng = random.Random(3)
    for _ in range(30):
        chain = Chain(5)
        for layer in chain.layers:
            if rng.random() < 0.8:
                layer.own[0] = array("Q", [some_entry(rng, 8 * layer.number) for _ in range(LEAF_BLOCKS)])
        for layer in chain.layers:
            for block in range(0, LEAF_BLOCKS, 7):
                found = layer.effective(0)[block]
                resolved = layer.resolve(block) if is_mixed(found) else tuple(item or 0 for item in meaning(found))
                assert resolved == walk(layer, block)
                assert all(resolved[sub] == found >> 32 for sub in range(SUBBLOCKS) if found >> sub & 1)
                mask = sum(1 << sub for sub, physical in enumerate(resolved) if physical)
                assert layer.data_mask(block) == mask


def test_an_effective_leaf_is_the_parents_own_object_where_nothing_was_written() -> None:
    chain = Chain(3)
    chain.layers[0].own[0] = array("Q", [entry(1, 0, FULL)] * LEAF_BLOCKS)
    assert chain.head.effective(0) is chain.layers[1].effective(0) is chain.layers[0].own[0]
    assert chain.head.effective(1) is ZERO_LEAF


def test_an_own_leaf_that_is_complete_is_the_effective_one() -> None:
    chain = Chain(2)
    chain.layers[0].own[0] = array("Q", [entry(1, 0, FULL)] * LEAF_BLOCKS)
    chain.layers[1].own[0] = array("Q", [entry(2, 0xFF00, 0x00FF)] * LEAF_BLOCKS)
    assert chain.layers[1].effective(0) is chain.layers[1].own[0]


def test_a_head_does_not_write_into_its_parents_leaf() -> None:
    chain = Chain(2)
    below = chain.layers[0].own[0] = array("Q", [entry(1, 0, FULL)] * LEAF_BLOCKS)
    before = below[:]
    assert chain.head.effective(0) is below
    chain.head.put(5, entry(9, 0, 1))
    assert below == before
    assert chain.layers[0].effective(0)[5] == entry(1, 0, FULL)
    assert chain.head.effective(0)[5] == mixed_entry(1, FULL ^ 1)


def test_the_shared_empty_leaf_is_never_written() -> None:
    chain = Chain(2)
    assert chain.head.effective(0) is ZERO_LEAF
    chain.head.put(0, entry(1, 0, 1))
    assert ZERO_LEAF == array("Q", bytes(8 * LEAF_BLOCKS))


def test_a_write_changes_what_a_mixed_block_resolves_to() -> None:
    chain = Chain(3)
    chain.layers[0].own[0] = array("Q", [entry(1, 0, FULL)] * LEAF_BLOCKS)
    chain.layers[1].own[0] = array("Q", [entry(2, 0, 1)] * LEAF_BLOCKS)
    assert chain.head.resolve(0) == (2, *[1] * 15)
    chain.head.put(0, entry(3, 0, 0b10))
    assert chain.head.resolve(0) == (2, 3, *[1] * 14)


def test_a_thousand_clones_of_an_image_share_its_leaves(pools: Pools) -> None:
    pool = pools.make()
    pool.create("base", LEAF)
    pool.volume("base").write(0, pattern(BLOCK))
    pool.snapshot("base", "image")
    with pool.batch():
        for number in range(1000):
            pool.clone("image", f"clone{number}")
    leaves = {id(pool.volume(f"clone{number}").layer.effective(0)) for number in range(1000)}
    assert len(leaves) == 1
    pool.remove(*(f"clone{number}" for number in range(1000)))


def test_a_clone_that_is_only_read_takes_no_memory_for_it_and_its_first_write_is_its_own(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("base", 64 * LEAF)
    base = pool.volume("base")
    for leaf in range(64):
        base.write(leaf * LEAF, pattern(BLOCK))
    pool.snapshot("base", "image")
    base.write(0, mixed := pattern(BLOCK // 16, seed=2))
    pool.snapshot("base", "image2")
    for name in ("a", "b"):
        pool.clone("image2", name)
    a, b, image = (pool.volume(name) for name in ("a", "b", "image2"))
    for leaf in range(64):
        assert a.read(leaf * LEAF, BLOCK) == b.read(leaf * LEAF, BLOCK) == image.read(leaf * LEAF, BLOCK)
    assert a.layer.effective_leaves is b.layer.effective_leaves is image.layer.effective_leaves
    assert a.layer.mixed is image.layer.mixed and 0 in image.layer.mixed
    a.write(0, pattern(BLOCK // 16, seed=3))
    assert b.read(0, BLOCK // 16) == image.read(0, BLOCK // 16) == mixed
    assert a.read(0, BLOCK // 16) == pattern(BLOCK // 16, seed=3)
    assert a.read(BLOCK // 16, BLOCK // 16) == b.read(BLOCK // 16, BLOCK // 16)
    assert a.read(LEAF, BLOCK) == b.read(LEAF, BLOCK)


def test_reading_at_any_depth_looks_into_one_leaf(pools: Pools) -> None:
    """A chain of 100 keeps no leaf for each of its layers, and the head's is as good as the first one's."""
    pool = pools.make(autocommit=False)
    pool.create("a", LEAF)
    pool.volume("a").write(0, data := pattern(BLOCK))
    for number in range(100):
        pool.snapshot("a", f"s{number}")
    assert pool.volume("a").read(0, BLOCK) == data
    assert pool.volume("a").layer.effective(0) is pool.volume("s0").layer.own[0]
    assert sum(len(layer.effective_leaves) for layer in pool.state.layers.values()) <= 3
    pool.remove(*(f"s{number}" for number in range(1, 100)))


# -- what is journalled


def test_single_changes_are_journalled_as_entries_and_whole_leaves_as_leaves() -> None:
    layer = Layer(3, None)
    layer.head = True
    layer.put(7, entry(1, 0, 1))
    layer.put(600, entry(2, 0, 1))
    layer.put(7, entry(1, 0, 3))
    assert layer.take_dirty() == [Entries(3, u64([7, 600]), u64([entry(1, 0, 3), entry(2, 0, 1)]))]
    assert layer.take_dirty() == []
    layer.put_leaf(1, None)
    layer.put(601, entry(4, 0, 1))
    layer.put(8, entry(5, 0, 1))
    leaf = array("Q", bytes(4096))
    leaf[601 - 512] = entry(4, 0, 1)
    assert layer.take_dirty() == [Leaf(3, 1, leaf.tobytes()), Entries(3, u64([8]), u64([entry(5, 0, 1)]))]


def test_a_leaf_that_is_gone_is_journalled_as_empty() -> None:
    layer = Layer(3, None)
    layer.put_leaf(2, array("Q", [entry(1, 0, 1)]) + array("Q", bytes(4088)))
    layer.put_leaf(2, None)
    assert layer.take_dirty() == [Leaf(3, 2, b"")]


def test_leaves_dropped_at_once_give_their_blocks_and_are_journalled_as_empty() -> None:
    layer = Layer(3, None)
    layer.head = True
    for block, physical in ((0, 9), (511, 4), (512, 7), (1024, 5)):
        layer.put(block, entry(physical, 0, 1))
    layer.put(513, entry(0, 1, 0))
    assert sorted(layer.drop_leaves([0, 1]).tolist()) == [4, 7, 9]
    assert (layer.blocks, list(layer.own)) == (1, [2])
    assert [layer.data_mask(block) for block in (0, 511, 512, 1024)] == [0, 0, 0, 1]
    assert layer.take_dirty() == [Leaf(3, 0, b""), Leaf(3, 1, b""), Entries(3, u64([1024]), u64([entry(5, 0, 1)]))]


def test_entries_are_packed_as_they_are_when_asked_for() -> None:
    layer = Layer(3, None)
    layer.put(0, entry(1, 0, 1))
    (record,) = layer.take_dirty()
    layer.put(0, entry(1, 0, 3))
    assert record == Entries(3, u64([0]), u64([entry(1, 0, 1)]))


def test_recovery_sets_entries_across_leaves_and_the_later_one_wins() -> None:
    layer = Layer(3, None)
    blocks = [5, 511, 512, 5000, 5]
    layer.load_entries(Entries(3, u64(blocks), u64([1 << 32, 2 << 32, 3 << 32, 4 << 32, 9 << 32])))
    assert {block: layer.entry(block) >> 32 for block in blocks} == {5: 9, 511: 2, 512: 3, 5000: 4}
    assert sorted(layer.own) == [0, 1, 5000 >> LEAF_SHIFT]
    layer.load_leaf(Leaf(3, 0, b""))
    assert layer.entry(5) == 0


@pytest.mark.parametrize("spread", [1, 100, 1 << 20])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
def test_recovery_sets_entries_alike_whether_they_lie_together_or_apart(count: int, spread: int) -> None:
    rng = random.Random(count * spread)
    blocks = sorted(rng.randrange(count * spread) for _ in range(count))
    entries = [rng.getrandbits(64) for _ in blocks]
    layer = Layer(3, None)
    layer.load_entries(Entries(3, u64(blocks), u64(entries)))
    expected = dict(zip(blocks, entries, strict=True))
    assert {block: layer.entry(block) for block in expected} == expected
    assert sum(entry != 0 for own in layer.own.values() for entry in own) == len(expected)


@pytest.mark.parametrize(
    "record", [Entries(1, u64([1, 2]), u64([1])), Entries(1, b"123", b""), Leaf(1, 0, b"12345678"), Leaf(1, 0, b"123")]
)
def test_entries_of_a_wrong_length_are_refused(record: Record) -> None:
    state = State()
    state.apply(records.Layer(1, 0))
    with pytest.raises(BadRecord):
        state.apply(record)


# -- what exists


def named(name: str, layer: int, snapshot: bool = False) -> Name:
    return Name(name, snapshot, layer, 512, 0.0, {})


@pytest.fixture
def state() -> State:
    """Volume v on snapshot s, clone c of s."""
    state = State()
    for record in (
        records.Layer(1, 0),
        named("v", 1),
        named("s", 1, True),
        records.Layer(2, 1),
        named("v", 2),
        records.Layer(3, 1),
        named("c", 3),
    ):
        assert state.apply(record) == []
    return state


def numbers(layers: list[Layer]) -> list[int]:
    return [layer.number for layer in layers]


def test_a_head_goes_with_its_name(state: State) -> None:
    assert numbers(state.apply(Unname("v"))) == [2]
    assert sorted(state.layers) == [1, 3]


def test_a_layer_with_children_stays_without_its_name(state: State) -> None:
    assert state.apply(Unname("s")) == []
    assert state.layers[1].name is None
    assert not state.mergeable


def test_it_can_be_merged_once_one_child_is_left_and_goes_with_the_last(state: State) -> None:
    state.apply(Unname("s"))
    assert numbers(state.apply(Unname("v"))) == [2]
    assert list(state.mergeable) == [1]
    assert numbers(state.apply(Unname("c"))) == [3, 1]
    assert (state.layers, state.mergeable) == ({}, {})


def test_a_rollback_drops_the_old_head(state: State) -> None:
    state.apply(records.Layer(4, 1))
    assert numbers(state.apply(named("v", 4))) == [2]


def test_a_new_name_before_the_old_one_goes_keeps_the_layer(state: State) -> None:
    assert state.apply(named("w", 2)) == []
    assert state.apply(Unname("v")) == []
    assert state.layers[2].name == "w"


def test_applying_records_twice_is_applying_them_once(state: State) -> None:
    """So that a checkpoint and the frames it stands for may overlap."""
    before = dict(state.names), sorted(state.layers), state.next_layer, state.snapshots
    for record in state.snapshot_records():
        state.apply(record)
    assert (dict(state.names), sorted(state.layers), state.next_layer, state.snapshots) == before


def test_layer_numbers_are_never_given_out_twice(pools: Pools) -> None:
    pool = pools.make()
    pool.create("a", 4 * KiB)
    pool.create("b", 4 * KiB)
    pool.remove("b")
    before = pool.state.next_layer
    pool = pools.reopen(pool)
    assert pool.state.next_layer == before
    pool.journal.bytes_since_checkpoint = 1 << 40
    pool.create("c", 4 * KiB)
    pool.remove("c")
    pool = pools.reopen(pool)
    pool.create("d", 4 * KiB)
    assert pool.volume("d").layer.number == before + 1


@pytest.mark.parametrize(
    "record", [Unname("x"), Entries(9, b"", b""), Leaf(9, 0, b""), named("x", 9), records.Layer(9, 8)]
)
def test_a_record_about_what_does_not_exist_is_refused(state: State, record: Record) -> None:
    with pytest.raises(BadRecord, match="does not exist"):
        state.apply(record)


def test_a_checkpoint_lists_parents_before_their_children(pools: Pools) -> None:
    """Even where merging has put an older layer on top of a younger one's parent."""
    pool = pools.make()
    pool.create("a", 4 * KiB)
    for name in ("s1", "s2", "s3"):
        pool.snapshot("a", name)
    pool.clone("s2", "b")
    pool.remove("s1")
    seen = {0}
    for record in pool.state.snapshot_records():
        if isinstance(record, records.Layer):
            assert record.parent in seen
            seen.add(record.layer)
    assert seen == {0, *pool.state.layers}
    assert check(pool) == []

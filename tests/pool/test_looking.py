"""A closer look: explain, map and du, held against what reading, writing and removing really do."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin.errors import Invalid, NotFound
from nbdthin.pool import sums
from nbdthin.pool.layers import SUBBLOCKS
from nbdthin.pool.pool import Pool
from nbdthin.pool.views import DATA, NOTHING, UNWRITTEN, ZERO, Map
from nbdthin.pool.volume import Volume
from nbdthin.units import MiB

from .conftest import BLOCK, LEAF, SUB, Pools, chain, fill, over_leaves, pattern, used, walk


@pytest.fixture
def family(pool: Pool) -> Pool:
    """web, on base@1 and what base@0 was: all kinds of blocks."""
    pool.create("base", 8 * MiB)
    pool.volume("base").write(0, pattern(4 * BLOCK))
    pool.snapshot("base", "base@0")
    pool.volume("base").write(BLOCK, pattern(SUB, 2))
    pool.volume("base").trim(2 * BLOCK, BLOCK)
    pool.snapshot("base", "base@1")
    pool.clone("base@1", "web")
    pool.volume("web").write(3 * BLOCK + 2 * SUB, pattern(SUB, 3))
    return pool


# -- explain


def test_a_byte_is_followed_to_the_layer_that_owns_it(family: Pool) -> None:
    seen = family.explain("web", 100)
    assert (seen.block, seen.subblock, seen.state, seen.owner, seen.depth, seen.chain) == (0, 0, DATA, "base@0", 2, 3)
    assert [(look.name, look.says) for look in seen.layers] == [
        ("web", NOTHING),
        ("base@1", NOTHING),
        ("base@0", DATA),
    ]
    assert seen.position is not None and seen.physical == seen.position // BLOCK
    assert family.data.path.read_bytes()[seen.position :][:10] == pattern(BLOCK)[100:110]


def test_zeroes_are_told_from_what_was_never_written(family: Pool) -> None:
    seen = family.explain("web", 2 * BLOCK + 5)
    assert (seen.state, seen.owner, seen.depth, seen.physical, seen.position) == (ZERO, "base@1", 1, None, None)
    seen = family.explain("web", 5 * MiB)
    assert (seen.state, seen.owner, seen.layer, seen.chain) == (UNWRITTEN, None, None, 3)


def test_how_a_read_finds_it_is_told(family: Pool) -> None:
    family.create("alone", MiB)
    family.volume("alone").write(0, b"x")
    assert family.explain("alone", 0).lookup == "own leaf"
    assert family.explain("base", 0).lookup == "shared leaf"
    assert family.explain("web", BLOCK).lookup == "walk"


def test_a_layer_without_a_name_is_told_by_its_number(family: Pool) -> None:
    family.clone("base@0", "other")
    layer = family.volume("base@0").layer.number
    family.remove("base@0")
    seen = family.explain("web", 0)
    assert (seen.owner, seen.layer) == (None, layer)


def test_explaining_agrees_with_reading_everywhere(family: Pool) -> None:
    for name in ("base", "base@0", "base@1", "web"):
        volume = family.volume(name)
        for offset in range(0, 5 * BLOCK, SUB // 2):
            ((position, _),) = volume.segments(offset, 1)
            seen = family.explain(name, offset)
            assert seen.position == (position if position >= 0 else None)
            assert seen.state == DATA or volume.read(offset, 1) == b"\0"


def test_a_checksum_is_known_once_it_was_computed_for_sealed_data(family: Pool) -> None:
    assert not family.explain("web", 0).checksum
    for work in sums.missing(family):
        work.run()
    assert family.explain("web", 0).checksum
    assert not family.explain("web", 2 * BLOCK).checksum, "a zero"
    assert not family.explain("web", 3 * BLOCK + 2 * SUB).checksum, "a head's own data"
    assert family.explain("web", 3 * BLOCK).checksum is True


WRITES = [
    # offset and length; action, subblocks overwritten, filled, in new blocks, new blocks, bytes read first
    (3 * BLOCK + 2 * SUB, SUB, "overwrite", 1, 0, 0, 0, 0),
    (3 * BLOCK + 2 * SUB + 5, 100, "overwrite", 1, 0, 0, 0, 0),
    (3 * BLOCK, SUB, "fill", 0, 1, 0, 0, 0),
    (3 * BLOCK + 5, 100, "fill", 0, 1, 0, 0, SUB - 100),
    (3 * BLOCK + SUB + 5, SUB, "fill", 1, 1, 0, 0, 5),
    (0, SUB, "allocate", 0, 0, 1, 1, 0),
    (5, BLOCK, "allocate", 0, 0, 17, 2, SUB),
    (3 * BLOCK, 2 * BLOCK, "allocate", 1, 15, 16, 1, 0),
    (5 * MiB + 1, 1, "allocate", 0, 0, 1, 1, 0),
]


@pytest.mark.parametrize(("offset", "length", "action", "overwritten", "filled", "allocated", "blocks", "read"), WRITES)
def test_what_a_write_would_do_is_what_it_does(
    family: Pool,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
    length: int,
    action: str,
    overwritten: int,
    filled: int,
    allocated: int,
    blocks: int,
    read: int,
) -> None:
    plan = family.explain("web", offset, length).write
    assert (plan.action, plan.why) == (action, None)
    assert (plan.overwritten, plan.filled, plan.allocated, plan.blocks) == (overwritten, filled, allocated, blocks)
    assert plan.read == read
    was_read: list[int] = []
    monkeypatch.setattr(family.data, "read_segments", _noting(family, was_read))
    before, owned = used(family), family.volume("web").layer.entry
    masks = [owned(block) & 0xFFFF for block in range(128)]
    family.volume("web").write(offset, pattern(length, 9))
    assert used(family) - before == blocks
    fresh = sum((owned(block) & 0xFFFF & ~mask).bit_count() for block, mask in enumerate(masks))
    assert fresh == filled + allocated
    assert sum(was_read) == read


def _noting(pool: Pool, was_read: list[int]) -> Callable[..., None]:
    real = pool.data.read_segments

    def read_segments(segments: list[tuple[int, int]], view: memoryview, flags: int = 0) -> None:
        was_read.extend(length for position, length in segments if position >= 0)
        real(segments, view, flags)

    return read_segments


def test_a_write_that_would_be_refused_says_why(pools: Pools, full: Pool) -> None:
    pool = pools.make()
    pool.create("v", MiB)
    pool.snapshot("v", "s")
    why = pool.explain("s", 0).write.why
    assert why is not None and "snapshot" in why
    pool.quota("v", BLOCK)
    assert pool.explain("v", 0, BLOCK).write.why is None
    why = pool.explain("v", 0, 2 * BLOCK).write.why
    assert why is not None and "quota leaves 64 KiB" in why
    pool.volume("v").write(0, pattern(BLOCK))
    assert pool.explain("v", 0, BLOCK).write.action == "overwrite"
    why = pool.explain("v", BLOCK).write.why
    assert why is not None and "at its quota" in why
    full.create("v", MiB)
    fill(full)
    plan = full.explain("v", 0).write
    assert plan.action == "refused" and plan.why is not None and "the pool is full" in plan.why
    assert full.explain("filler", 0).write.action == "overwrite"


def test_only_what_is_there_can_be_explained(family: Pool) -> None:
    for offset, length in ((8 * MiB, None), (-1, None), (8 * MiB - 1, 2), (0, 0), (0, 1 << 40)):
        with pytest.raises(Invalid):
            family.explain("web", offset, length)
    with pytest.raises(NotFound):
        family.explain("no", 0)


def test_explaining_changes_nothing(full: Pool) -> None:
    full.create("v", MiB)
    full.commit()
    free = full.allocator.free
    for offset in range(0, MiB, SUB):
        full.explain("v", offset, SUB)
    assert full.allocator.free == free and not full.has_changes


# -- map


def expected(pool: Pool, name: str, cell: int) -> tuple[dict[int, int], dict[int, int], int, int, list[Counter[int]]]:
    """By walking, subblock by subblock: data and runs by layer, all runs, the highest byte, data by cell and layer."""
    volume = pool.volume(name)
    data: Counter[int] = Counter()
    runs: Counter[int] = Counter()
    every = highest = 0
    cells: list[Counter[int]] = [Counter() for _ in range(-(-volume.size // cell))]
    before: tuple[int, int] | None = None  # position behind the last subblock with data, and its layer
    for number in range(-(-volume.size // SUB)):
        block, sub = divmod(number, SUBBLOCKS)
        physical = walk(volume.layer, block)[sub]
        if not physical:
            before = None
            continue
        length = min(SUB, volume.size - number * SUB)
        owner = next(each.number for each in chain(volume.layer) if each.entry(block) >> 32 == physical)
        position = physical * BLOCK + sub * SUB
        every += before is None or before[0] != position
        runs[owner] += before != (position, owner)
        before = (position + SUB, owner)
        data[owner] += length
        highest = number * SUB + length
        cells[number * SUB // cell][owner] += length
    return dict(data), dict(runs), every, highest, cells


def assert_right(pool: Pool, name: str, shown: Map) -> None:
    data, runs, every, highest, cells = expected(pool, name, shown.cell)
    assert {owner.layer: owner.data for owner in shown.owners} == data
    assert {owner.layer: owner.runs for owner in shown.owners} == runs
    assert (shown.runs, shown.highest, shown.data) == (every, highest, sum(data.values()))
    assert len(shown.cells) == len(cells)
    for cell, tally in zip(shown.cells, cells, strict=True):
        assert cell.data == tally.total()
        if cell.owner is None:
            assert not tally
        else:
            assert tally[shown.owners[cell.owner].layer] == max(tally.values())


def written(pools: Pools, seed: int) -> Pool:
    """Three leaves and an odd end, written in all ways, with snapshots in between; and clones of some."""
    pool = pools.make(size=16 * MiB)
    rng = random.Random(seed)
    pool.create("v", 3 * LEAF - 5 * SUB + 512)
    names = ["v"]
    for number in range(6):
        for name in names:
            scribble(pool.volume(name), rng)
        pool.snapshot(rng.choice(names), f"s{number}")
        if number % 2:
            pool.clone(f"s{number}", f"c{number}")
            names.append(f"c{number}")
    pool.volume("v").write(pool.volume("v").size - 600, pattern(600))
    return pool


def scribble(volume: Volume, rng: random.Random) -> None:
    for _ in range(6):
        place = rng.choice([0, LEAF - 4 * BLOCK, 2 * LEAF]) + rng.randrange(8 * SUBBLOCKS) * SUB
        length = rng.choice([SUB, 3 * SUB, BLOCK, 4 * BLOCK])
        match rng.randrange(6):
            case 0:
                volume.trim(place, length)
            case 1:
                volume.write_zeroes(place, length, allocate=True)
            case _:
                volume.write(place, pattern(length, place))


@pytest.mark.parametrize("cells", [1, 2, 3, 7, 64, 1000, 4096])
def test_a_map_is_what_walking_finds(pools: Pools, cells: int) -> None:
    pool = written(pools, cells)
    for name in ("v", "s2", "c3"):
        shown = pool.map(name, cells)
        assert len(shown.cells) <= cells and 2 * len(shown.cells) > min(cells, 2)
        assert_right(pool, name, shown)


def test_a_map_of_a_small_volume_has_a_cell_for_each_subblock(pool: Pool) -> None:
    pool.create("v", BLOCK)
    pool.volume("v").write(3 * SUB, pattern(2 * SUB))
    shown = pool.map("v")
    assert shown.cell == SUB
    assert [cell.data for cell in shown.cells] == [SUB if sub in (3, 4) else 0 for sub in range(16)]
    assert_right(pool, "v", shown)


def test_a_map_of_what_is_empty_has_no_owners(pool: Pool) -> None:
    pool.create("v", 512)
    shown = pool.map("v")
    assert (shown.owners, shown.data, shown.runs, shown.highest, len(shown.cells)) == ((), 0, 0, 0, 1)


def test_runs_are_those_that_reading_meets(pools: Pools) -> None:
    pool = written(pools, 3)
    for row in pool.list():
        volume = pool.volume(row.name)
        segments = volume.segments(0, volume.size)
        assert pool.map(row.name, 16).runs == sum(position >= 0 for position, _ in segments)


@pytest.mark.parametrize("each", [4, 16, 32])
def test_cells_that_hold_several_leaves_know_who_has_most_of_them(pools: Pools, each: int) -> None:
    pool = over_leaves(pools.make(), 40, "s")
    own = [leaf % 3 == 0 for leaf in range(40)]
    own[16:32] = [True] * 16
    for leaf in range(40):
        if own[leaf]:
            pool.volume("v").write(leaf * LEAF, pattern(3 * BLOCK, leaf))
    shown = pool.map("v", -(-40 // each))
    assert shown.cell == each * LEAF
    assert {owner.name: owner.data for owner in shown.owners} == {
        "v": sum(own) * 3 * BLOCK,
        "s": (40 - sum(own)) * 2 * BLOCK,
    }
    for index, cell in enumerate(shown.cells):
        inside = own[index * each : (index + 1) * each]
        by_name = {"v": 3 * sum(inside), "s": 2 * (len(inside) - sum(inside))}
        assert cell.data == sum(by_name.values()) * BLOCK and cell.owner is not None
        assert by_name[shown.owners[cell.owner].name or ""] == max(by_name.values())
    assert {cell.owner for cell in shown.cells} == {0, 1} or each == 32


def test_a_map_has_its_bounds(pool: Pool) -> None:
    pool.create("v", MiB)
    for cells in (0, 4097):
        with pytest.raises(Invalid):
            pool.map("v", cells)
    with pytest.raises(NotFound):
        pool.map("no")


# -- du


def assert_frees(pool: Pool, names: tuple[str, ...], directory: Path, seed: int | None = None) -> int:
    """On a copy of the pool, written to again where there is a seed: what `du` promises of `names` is what removing
    them gives back when all that follows is done. Returns it."""
    copy = shutil.copytree(pool.path, directory / "copy")
    try:
        with Pool.open(copy, policy=pool.policy) as twin:
            twin.merge_all()
            if seed is not None:  # what layers without a name need not keep any more, and do until something is removed
                for row in twin.list():
                    if row.kind == "volume":
                        scribble(twin.volume(row.name), random.Random(seed))
            promised, before = twin.du(*names).freed, twin.info().data_used
            twin.remove(*names)
            assert not twin.state.mergeable and not twin.state.prunable
            assert promised == before - twin.info().data_used, names
            return promised
    finally:
        shutil.rmtree(copy)


def test_two_clones_that_share_a_block_free_it_together(pool: Pool) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    pool.clone("s", "a")
    pool.clone("s", "b")
    pool.volume("a").write(0, pattern(BLOCK))
    pool.remove("v", "s")
    assert pool.du("a").freed == BLOCK
    assert pool.du("b").freed == 0 + BLOCK, "a hides the first one"
    assert pool.du("a", "b").freed == 3 * BLOCK


def test_without_names_it_is_all_of_the_pool(family: Pool) -> None:
    use = family.du()
    assert [row.name for row in use.rows] == ["base", "base@0", "base@1", "web"]
    assert use.rows == tuple(family.list())
    assert use.freed == use.used == family.info().data_used
    assert family.du("web", "web").rows == (family.show("web"),)
    with pytest.raises(NotFound):
        family.du("web", "no")


def test_of_one_name_it_frees_what_is_exclusive(family: Pool) -> None:
    for row in family.list():
        assert family.du(row.name).freed == row.exclusive, row.name


@pytest.mark.parametrize("seed", range(3))
def test_what_removing_together_frees_is_exact(pools: Pools, tmp_path: Path, seed: int) -> None:
    pool = written(pools, 100 + seed)
    rng = random.Random(seed)
    names = [row.name for row in pool.list()]
    for _ in range(2):  # some layers of the pool have no name before
        pool.remove(names.pop(rng.randrange(len(names))))
    for count in range(1, len(names) + 1):
        assert_frees(pool, tuple(rng.sample(names, count)), tmp_path)
        assert_frees(pool, tuple(rng.sample(names, count)), tmp_path, seed)


def test_every_order_of_removal_frees_the_same(pools: Pools, tmp_path: Path) -> None:
    """Layers without a name below each other, with several children each: what one hides, the other does not need."""
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.snapshot("v", "low")
    pool.clone("low", "m")
    pool.volume("m").write(0, pattern(BLOCK))
    pool.volume("v").write(0, pattern(BLOCK))
    pool.snapshot("v", "high")
    pool.clone("high", "x")
    for name in "vx":
        pool.volume(name).write(0, pattern(BLOCK))
    pool.commit()
    for chosen in (("low", "high"), ("high", "low")):
        assert assert_frees(pool, chosen, tmp_path) == 2 * BLOCK


def test_what_was_removed_before_is_not_counted_again(quiet: Pool, tmp_path: Path) -> None:
    pool = quiet
    pool.create("v", MiB)
    for number in range(3):
        pool.volume("v").write(0, pattern(2 * BLOCK, number))
        pool.snapshot("v", f"s{number}")
    pool.volume("v").write(0, pattern(BLOCK))
    pool.commit()
    pool.remove("s0")
    pool.commit()
    assert pool.state.mergeable, "and not merged yet"
    for chosen in itertools.chain(itertools.combinations(["s1", "s2", "v"], 1), itertools.combinations(["s1", "v"], 2)):
        assert pool.du(*chosen).freed == assert_frees(pool, chosen, tmp_path), chosen
    assert pool.du().freed == pool.du().used - 2 * BLOCK

"""Referenced, exclusive and shared, by examples; test_model.py holds them against their definition everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbdthin.pool import merge, space
from nbdthin.pool.pool import Pool
from nbdthin.units import MiB

from .conftest import BLOCK, LEAF, SUB, Pools, over_leaves, pattern


def blocks(pool: Pool, name: str) -> tuple[int, int, int]:
    """(referenced, exclusive, shared) in blocks."""
    row = pool.show(name)
    return row.referenced // BLOCK, row.exclusive // BLOCK, row.shared // BLOCK


@pytest.fixture
def volume(pool: Pool) -> Pool:
    """Volume v with four full blocks."""
    pool.create("v", 8 * MiB)
    pool.volume("v").write(0, pattern(4 * BLOCK))
    return pool


def test_a_volume_alone_has_its_blocks_to_itself(volume: Pool) -> None:
    assert blocks(volume, "v") == (4, 4, 0)


def test_after_a_snapshot_all_is_shared(volume: Pool) -> None:
    volume.snapshot("v", "s")
    assert blocks(volume, "v") == blocks(volume, "s") == (4, 0, 4)


def test_a_block_written_over_in_part_is_referenced_in_both_layers(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.volume("v").write(0, pattern(SUB))
    assert blocks(volume, "v") == (5, 1, 4)
    assert blocks(volume, "s") == (4, 1, 3), "without s the two would be joined in one block"


def test_a_block_written_over_whole_is_the_snapshots_alone(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.volume("v").write(0, pattern(BLOCK))
    assert blocks(volume, "v") == (4, 1, 3)
    assert blocks(volume, "s") == (4, 1, 3)


def test_a_block_trimmed_over_is_the_snapshots_alone(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.volume("v").trim(0, 2 * BLOCK)
    assert blocks(volume, "v") == (2, 0, 2)
    assert blocks(volume, "s") == (4, 2, 2)


def test_what_two_clones_both_hide_is_the_images_alone(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.clone("s", "c")
    volume.volume("v").write(0, pattern(2 * BLOCK))
    assert blocks(volume, "s") == (4, 0, 4)
    volume.volume("c").write(BLOCK, pattern(2 * BLOCK))
    assert blocks(volume, "s") == (4, 1, 3)
    volume.remove("s")
    assert volume.allocator.used == 3 + 2 + 2


def test_what_only_one_of_two_clones_of_a_removed_image_shows_is_its_own(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.clone("s", "c")
    volume.volume("v").write(0, pattern(3 * BLOCK))
    volume.remove("s")
    assert blocks(volume, "c") == (4, 3, 1)
    volume.remove("c")
    assert blocks(volume, "v") == (4, 4, 0)
    assert volume.allocator.used == 4


def test_provisioned_blocks_count_for_who_owns_them(volume: Pool) -> None:
    volume.volume("v").write_zeroes(8 * BLOCK, 2 * BLOCK, allocate=True)
    assert blocks(volume, "v") == (6, 6, 0)
    volume.snapshot("v", "s")
    assert blocks(volume, "s") == (6, 0, 6), "v would take them over"
    assert blocks(volume, "v") == (4, 0, 4)
    volume.volume("v").write_zeroes(0, SUB, allocate=True)
    assert blocks(volume, "v") == (5, 1, 4)


def test_many_blocks_of_several_layers_count_once_for_each_layer_that_shows_some(pool: Pool) -> None:
    pool.create("v", 8 * MiB)
    pool.volume("v").write(0, pattern(40 * BLOCK))
    for number, count in enumerate((30, 25, 20)):
        pool.snapshot("v", f"s{number}")
        for block in range(count):
            pool.volume("v").write(block * BLOCK + number * SUB, pattern(SUB, block))
    assert [blocks(pool, name)[0] for name in ("s0", "s1", "s2", "v")] == [40, 70, 95, 115]
    for block in range(18):  # what the first of them wrote is hidden, with what the last wrote
        pool.volume("v").trim(block * BLOCK, SUB)
    assert blocks(pool, "v")[0] == 115 - 18
    pool.snapshot("v", "s3")
    pool.clone("s3", "c")
    for block in range(17):
        pool.volume("c").write(block * BLOCK, pattern(BLOCK))
    assert blocks(pool, "c")[0] == 115 - 18 - 17 * 3 + 17


def test_reading_changes_no_figure(volume: Pool) -> None:
    volume.snapshot("v", "s")
    volume.volume("v").write(0, pattern(SUB))
    before = volume.list()
    for name in ("v", "s"):
        volume.volume(name).read(0, 8 * MiB)
    assert volume.list() == before


def test_figures_are_right_at_every_moment_of_a_merge(pools: Pools) -> None:
    pool = over_leaves(pools.make(autocommit=False), 4, "s")
    for leaf in range(4):
        pool.volume("v").write(leaf * LEAF + BLOCK, pattern(BLOCK, leaf))
    pool.list()
    pool.remove("s")
    pool.commit()
    assert blocks(pool, "v")[0] == 8
    for step in merge.steps(pool, pool.state.layers[1]):
        step.copy()
        step.finish()
        assert blocks(pool, "v")[0] == 8
    assert blocks(pool, "v") == (8, 8, 0)


def test_figures_stay_right_when_a_child_is_written_after_pruning(volume: Pool) -> None:
    volume.snapshot("v", "s")
    for name in "bc":
        volume.clone("s", name)
    for name in "vbc":
        volume.volume(name).write(0, pattern(BLOCK, ord(name)))
    volume.list()
    volume.remove("s")
    assert volume.allocator.used == 3 + 3
    volume.volume("v").write(BLOCK, pattern(SUB))
    assert [blocks(volume, name) for name in "vbc"] == [(5, 2, 3), (4, 1, 3), (4, 1, 3)]


def test_removing_gives_back_what_exclusive_said(volume: Pool, tmp_path: Path) -> None:
    """For every name of a family, on a copy of the pool."""
    volume.snapshot("v", "v@1")
    volume.volume("v").write(2 * BLOCK + SUB, pattern(3 * BLOCK))
    volume.snapshot("v", "v@2")
    volume.volume("v").trim(BLOCK, BLOCK + SUB)
    volume.clone("v@1", "c")
    volume.volume("c").write(0, pattern(BLOCK + 5))
    volume.clone("v@2", "d", size=16 * MiB)
    volume.volume("d").write_zeroes(3 * BLOCK, 4 * BLOCK, allocate=True)
    volume.volume("d").write(9 * MiB, pattern(BLOCK))
    volume.commit()
    for row in volume.list():
        copy = shutil.copytree(volume.path, tmp_path / "copy")
        with Pool.open(copy) as twin:
            used = twin.info().data_used
            twin.remove(row.name)
            assert used - twin.info().data_used == row.exclusive, row.name
        shutil.rmtree(copy)


def test_the_names_of_a_pool_need_all_of_its_blocks(volume: Pool) -> None:
    """Removed one by one, each gives back what it says at its turn, and in the end all is free."""
    for number in range(6):
        volume.snapshot("v", f"v@{number}")
        volume.volume("v").write(number * 3 * SUB, pattern(BLOCK + 100 * number, number))
    volume.commit()
    for name in ("v@3", "v@0", "v", "v@5", "v@1", "v@4", "v@2"):
        before, promised = volume.info().data_used, volume.show(name).exclusive
        volume.remove(name)
        assert before - volume.info().data_used == promised, name
    assert volume.info().data_used == 0


def test_figures_prepared_in_steps_are_right_whatever_happens_between_them(pools: Pools) -> None:
    pool = over_leaves(pools.make(autocommit=False), 6, "s")
    over = [pool.volume("v").layer, pool.volume("s").layer]
    for leaf in range(6):
        pool.volume("v").write(leaf * LEAF + BLOCK, pattern(BLOCK, leaf))
    for number, _ in enumerate(space.prepare(over)):
        match number:
            case 1:
                pool.volume("v").write(0, pattern(SUB))
            case 2:
                pool.volume("v").trim(3 * LEAF, LEAF)
            case 4:
                pool.snapshot("v", "s2")
            case 6:
                pool.remove("s")
                pool.commit()
                pool.merge_all()
    assert [(row.name, row.referenced // BLOCK) for row in pool.list()] == [("s2", 10), ("v", 10)]
    before = pool.list()
    assert pools.reopen(pool).list() == before

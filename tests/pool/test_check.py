"""`check` finds what is wrong, and says where: a sound pool first, then one named damage at a time."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin.errors import Error, NotFound
from nbdthin.pool.check import check, check_path
from nbdthin.pool.journal import frame
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Counter, Entries, Layer, Leaf, Name, Record, encode, u64
from nbdthin.units import MiB

from .conftest import BLOCK, SUB, Pools, checkpoints, flip, frames, logs, pattern


@pytest.fixture
def family(pools: Pools) -> Pool:
    """Volume v on v@2 on v@1, and clone c of v@1; every layer owns something."""
    pool = pools.make()
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK, 1))
    pool.snapshot("v", "v@1")
    pool.clone("v@1", "c")
    pool.volume("c").write(BLOCK, pattern(SUB, 2))
    pool.volume("v").write(2 * BLOCK, pattern(SUB, 3))
    pool.snapshot("v", "v@2")
    pool.volume("v").write(0, pattern(SUB, 4))
    pool.commit()
    return pool


def test_a_sound_pool_has_no_problems_and_its_figures_are_reported(pools: Pools, family: Pool) -> None:
    used, sequence = family.allocator.used, family.journal.sequence
    report = check_path(pools.close(family))
    assert report.problems == ()
    assert (report.path, report.names, report.layers, report.blocks, report.frames) == (
        family.path,
        4,
        4,
        used,
        sequence,
    )


def test_a_check_of_what_is_no_pool_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        check_path(tmp_path)
    assert not list(tmp_path.iterdir())


def entry(physical: int, zero: int, data: int) -> int:
    return physical << 32 | zero << 16 | data


# -- damage in the files: records that a sound frame carries and that do not add up


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            Entries(1, u64([9]), u64([entry(1, 0, 1)])),
            "block 0 of layer 1 shares physical block 1 with block 9 of layer 1: it has two owners",
        ),
        (Entries(4, u64([9]), u64([entry(1, 0, 1)])), "has two owners"),
        (
            Entries(1, u64([9]), u64([entry(1 << 20, 0, 1)])),
            r"byte \d+: block 9 of layer 1 lies outside the pool; it concerns c, v, v@1, v@2",
        ),
        (Entries(1, u64([9]), u64([entry(500, 1, 1)])), "block 9 of layer 1 is data and zero at once"),
        (Entries(1, u64([9]), u64([entry(0, 0, 1)])), "block 9 of layer 1 has data in no block"),
        (Layer(9, 1), "layer 9 is reached by no name"),
        (Layer(1, 2), "layer . is its own ancestor"),
        (Name("x", False, 1, MiB, 0.0, {}), "layer 1 does not know that it is 'v@1'|volume 'x' has layers on top"),
        (Name("v", True, 3, MiB, 0.0, {}), ""),
        (Leaf(1, 1 << 60, u64([0] * 511 + [entry(1, 0, 1)])), "a leaf of 4096 bytes, number 1152921504606846976"),
        (Leaf(1, 1 << 40, u64([0] * 511 + [entry(1, 0, 1)])), "two owners"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tuple) else None,
)
def test_records_that_do_not_add_up_are_found(pools: Pools, family: Pool, damage: Record, message: str) -> None:
    family.journal.append(encode([damage]))
    report = check_path(pools.crash(family))
    if message:
        assert any(re.search(message, problem) for problem in report.problems), report.problems
    assert all(len(problem.splitlines()) == 1 for problem in report.problems)


def broken_superblock(path: Path) -> str:
    flip(path / "superblock", 20)
    return "superblock is damaged"


def broken_data_header(path: Path) -> str:
    flip(path / "data", 20)
    return "header is damaged"


def broken_frame(path: Path) -> str:
    log = logs(path)[-1]
    flip(log, frames(log)[1][0] + 30)
    return f"{log.name} at byte {frames(log)[0][1]}: a damaged frame"


def broken_checkpoint(path: Path) -> str:
    flip(checkpoints(path)[-1], 3)
    return "checkpoint at byte 0"


def missing_segment(path: Path) -> str:
    logs(path)[-1].unlink()
    return "is missing"


def unknown_record(path: Path) -> str:
    log = logs(path)[-1]
    with open(log, "r+b") as file:
        file.seek(frames(log)[-1][1])
        file.write(frame(len(frames(log)) + 1, b"\x91\x92\x63\x01"))
    return f"{log.name} at byte"


def missing_data(path: Path) -> str:
    (path / "data").unlink()
    return "data is missing"


def truncated_data(path: Path) -> str:
    with open(path / "data", "r+b") as file:
        file.truncate(MiB)
    return "it was truncated"


@pytest.mark.parametrize(
    "damage",
    [
        broken_superblock,
        broken_data_header,
        broken_frame,
        broken_checkpoint,
        missing_segment,
        unknown_record,
        missing_data,
        truncated_data,
    ],
)
def test_damaged_files_are_found_and_named_and_left_alone(
    pools: Pools, family: Pool, damage: Callable[[Path], str]
) -> None:
    path = pools.close(family)
    message = damage(path)
    before = {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")}
    try:
        problems = check_path(path).problems
    except Error as error:  # what the pool cannot be opened without is an error of its own
        problems = (str(error),)
    assert len(problems) == 1
    assert message in problems[0]
    assert len(problems[0].splitlines()) == 1
    assert {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")} == before


# -- damage in memory, which a test would have found


def wrong_count(pool: Pool) -> str:
    pool.state.layers[1].blocks += 1
    return "layer 1 owns 2 blocks and counts 3"


def lost_block(pool: Pool) -> str:
    pool.allocator.allocate(1)
    return "is marked in use and has no owner"


def block_given_away(pool: Pool) -> str:
    pool.allocator.discard(1)
    return "physical block 1 is in use and not marked so"


def wrong_pending(pool: Pool) -> str:
    pool.allocator.pending += 1
    return "1 freed blocks are counted as pending"


def stale_effective_leaf(pool: Pool) -> str:
    layer = pool.volume("v").layer
    layer.effective(0)
    layer.effective_leaves[0] = array("Q", bytes(4096))
    return "the effective entry of block 0"


def stale_mixed_entry(pool: Pool) -> str:
    layer = pool.volume("v").layer
    leaf = layer.effective_leaves[0] = layer.effective(0)[:]
    leaf[0] ^= 1 << 32
    return "the effective entry of block 0"


def stale_mixed_block(pool: Pool) -> str:
    layer = pool.volume("v").layer
    layer.resolve(0)
    layer.mixed[0] = (7,) * 16
    return "the resolved block 0"


def unknown_child(pool: Pool) -> str:
    del pool.state.layers[1].children[2]
    return "layer 1 does not know its child 2"


def false_child(pool: Pool) -> str:
    pool.state.layers[4].children[2] = pool.state.layers[2]
    return "layer 4 wrongly counts layer 2 as its child"


def low_counter(pool: Pool) -> str:
    pool.state.next_layer = 4
    return "layer 4 is not below the counter 4"


def wrong_name(pool: Pool) -> str:
    pool.state.layers[1].name = "other"
    return "layer 1 does not know that it is 'v@1'"


def missing_layer(pool: Pool) -> str:
    del pool.state.layers[4]
    return "refers to layer 4, which does not exist"


def forgotten_merge(pool: Pool) -> str:
    pool.state.mergeable[1] = None
    return "layers to be merged: [], listed are [1]"


def wrong_snapshots(pool: Pool) -> str:
    pool.state.snapshots += 1
    return "3 snapshots are counted"


def entry_not_journalled(pool: Pool) -> str:
    pool.state.layers[1].own[0][1] ^= 1 << 16 | 1
    pool.state.layers[1].effective_leaves.clear()
    return "the journal holds another leaf 0 of layer 1"


def name_not_journalled(pool: Pool) -> str:
    pool.state.names["v"] = pool.state.names["v"]._replace(size=512)
    return "the journal holds other names"


def counter_not_journalled(pool: Pool) -> str:
    pool.state.next_layer += 1
    return "the journal holds another counter"


def short_leaf(pool: Pool) -> str:
    pool.state.layers[1].own[5] = array("Q", [0])
    return "leaf 5 of layer 1 has 1 entries"


@pytest.mark.parametrize(
    "damage",
    [
        wrong_count,
        lost_block,
        block_given_away,
        wrong_pending,
        stale_effective_leaf,
        stale_mixed_entry,
        stale_mixed_block,
        unknown_child,
        false_child,
        low_counter,
        wrong_name,
        missing_layer,
        forgotten_merge,
        wrong_snapshots,
        entry_not_journalled,
        name_not_journalled,
        counter_not_journalled,
        short_leaf,
    ],
)
def test_memory_that_does_not_add_up_is_found(pools: Pools, family: Pool, damage: Callable[[Pool], str]) -> None:
    assert check(family) == []
    message = damage(family)
    assert any(message in problem for problem in check(family)), check(family)
    pools.crash(family)


def test_a_pool_with_changes_that_are_not_durable_is_checked_all_the_same(quiet: Pool) -> None:
    quiet.create("v", MiB)
    quiet.volume("v").write(5, pattern(100))
    assert quiet.has_changes
    assert check(quiet) == []
    quiet.state.layers[1].blocks += 1
    assert check(quiet) != []
    quiet.state.layers[1].blocks -= 1


def test_a_counter_alone_is_a_record(pools: Pools, family: Pool) -> None:
    family.journal.append(encode([Counter(100)]))
    pool = pools.open(pools.crash(family))
    pool.create("w", 512)
    assert pool.volume("w").layer.number == 100
